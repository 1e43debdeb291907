//! `include/linux/kvm.h` of Linux 2.6.22, line by line: how much of each there is for a VM of 2007, where it differs from what
//! that kernel did, and the tests that show it. The README's table is printed from here.

use crate::ioctl::{ROWS, Support};
use Support::{Full, Partial};

/// What a line of the header is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A request.
    Ioctl,
    /// An exit reason.
    Exit,
    /// A field of `kvm_run`.
    Run,
    /// A structure or constant.
    Type,
}

/// One line of the header.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// What it is about.
    pub part: Part,
    /// As in the header; fields of `kvm_run` with the union's member.
    pub name: &'static str,
    /// Beyond or beside 2.6.22; empty: as there.
    pub differs: &'static str,
    /// Tests of this crate or of `kvm-abi`, by function. What shows it best comes first.
    pub shown_by: &'static [&'static str],
    support: Option<Support>,
}

impl Line {
    /// How much of it there is; for a request what the ioctls' table says.
    pub fn support(&self) -> Support {
        self.support.unwrap_or_else(|| {
            ROWS.iter().find(|row| row.name == self.name).map_or(Partial("not there"), |row| row.support)
        })
    }

    const fn but(mut self, differs: &'static str) -> Self {
        self.differs = differs;
        self
    }

    const fn partly(mut self, missing: &'static str) -> Self {
        self.support = Some(Partial(missing));
        self
    }
}

const fn line(part: Part, name: &'static str, shown_by: &'static [&'static str]) -> Line {
    let support = if matches!(part, Part::Ioctl) { None } else { Some(Full) };
    Line { part, name, differs: "", shown_by, support }
}

const fn ioctl(name: &'static str, shown_by: &'static [&'static str]) -> Line {
    line(Part::Ioctl, name, shown_by)
}

const fn exit(name: &'static str, shown_by: &'static [&'static str]) -> Line {
    line(Part::Exit, name, shown_by)
}

const fn run(name: &'static str, shown_by: &'static [&'static str]) -> Line {
    line(Part::Run, name, shown_by)
}

const fn of(name: &'static str, shown_by: &'static [&'static str]) -> Line {
    line(Part::Type, name, shown_by)
}

/// Every line, in the header's order within each part.
pub const LINES: &[Line] = &[
    ioctl("KVM_GET_API_VERSION", &["get_api_version_is_12_and_takes_no_argument"]),
    ioctl("KVM_CREATE_VM", &["create_vm_makes_an_empty_vm_and_takes_no_argument", "any_process_may_use_any_file"])
        .but("closed on exec, as today's, until KVM_SET_MEMORY_REGION tells that it is of 2007"),
    ioctl("KVM_GET_MSR_INDEX_LIST", &["get_msr_index_list_tells_the_total_before_e2big"])
        .but("today's list, which has 2007's; E2BIG unless there is room for all"),
    ioctl("KVM_CHECK_EXTENSION", &["check_extension_knows_none_of_the_unknown"]).but("answers as today"),
    ioctl("KVM_GET_VCPU_MMAP_SIZE", &["get_vcpu_mmap_size_covers_kvm_run_and_the_data_page"])
        .but("12288: a third page, as today"),
    ioctl(
        "KVM_SET_MEMORY_REGION",
        &[
            "set_memory_region_makes_zeroed_ram_and_size_0_frees_it",
            "the_window_shows_ram_where_the_guest_sees_it",
            "a_region_of_the_same_size_moves_with_its_contents",
            "the_same_place_with_other_flags_keeps_contents_and_log",
            "a_region_that_moves_keeps_its_log",
            "regions_are_einval_eexist_and_enomem",
            "memory_may_change_under_a_vcpu",
            "more_than_four_slots_may_be_used",
        ],
    )
    .but(
        "509 slots of up to 64 GiB; one that is deleted blocks no other; mmap works from the first of these on, and a child \
         of fork keeps what it has of a deleted slot",
    ),
    ioctl("KVM_CREATE_VCPU", &["create_vcpu_makes_any_number_once_each", "fresh_vcpus_are_all_alike"])
        .but("1024 of them; no pages at the end of slot 0"),
    ioctl(
        "KVM_GET_DIRTY_LOG",
        &[
            "get_dirty_log_gives_and_clears_a_bit_per_page",
            "the_bitmap_is_of_whole_words_and_counts_from_the_slot",
            "a_bad_pointer_is_efault_and_clears_nothing",
            "a_slot_without_a_log_is_enoent_and_one_beyond_all_einval",
            "stores_of_every_kind_are_logged",
            "string_stores_are_logged",
            "frames_of_interrupts_are_logged",
            "accessed_and_dirty_bits_of_the_walker_are_logged",
            "data_of_ins_is_logged",
            "a_store_through_an_alias_is_logged_at_its_target",
            "what_user_space_writes_is_not_logged",
            "a_log_that_is_taken_while_the_guest_stores_loses_nothing",
        ],
    )
    .but("data of INS and stores through aliases are logged too"),
    ioctl(
        "KVM_SET_MEMORY_ALIAS",
        &[
            "set_memory_alias_shows_ram_a_second_time",
            "an_alias_wins_over_a_slot_and_the_lowest_over_others",
            "an_alias_of_a_hole_is_a_device_at_the_alias",
            "an_alias_may_come_before_the_first_vcpu",
            "aliases_are_einval",
        ],
    ),
    ioctl(
        "KVM_RUN",
        &[
            "run_takes_no_argument",
            "a_pending_signal_does_not_keep_the_guest_from_running",
            "vcpus_run_in_parallel",
            "ioctls_of_a_running_vcpu_wait_until_run_returns",
            "an_exit_goes_before_a_signal",
        ],
    )
    .but("also ends with EINTR when another thread is the first to touch a slot, or deletes one that was touched"),
    ioctl("KVM_GET_REGS", &["get_regs_and_set_regs_take_anything", "debug_guest_steps_and_hides_tf_and_rf"])
        .but("real mode shows its own RFLAGS, as AMD's did"),
    ioctl(
        "KVM_SET_REGS",
        &[
            "get_regs_and_set_regs_take_anything",
            "set_regs_in_real_mode_drops_rflags_vm",
            "a_reset_from_inside_an_exit_is_not_skewed",
        ],
    ),
    ioctl("KVM_GET_SREGS", &["get_sregs_and_set_sregs_keep_what_is_given", "fresh_vcpus_are_all_alike"])
        .but("real mode shows its own segments, as AMD's did"),
    ioctl(
        "KVM_SET_SREGS",
        &[
            "get_sregs_and_set_sregs_keep_what_is_given",
            "set_sregs_refuses_nothing",
            "set_sregs_replaces_queued_vectors",
            "set_sregs_in_real_mode_takes_a_data_type_for_cs_and_moves_the_reset_base",
            "set_sregs_in_real_mode_keeps_base_limit_and_selector",
            "a_data_type_in_cs_executes_in_protected_mode",
            "a_segment_without_attributes_is_unusable",
            "set_sregs_loads_pdptes",
            "real_mode_state_with_rflags_vm_is_real_mode",
        ],
    ),
    ioctl("KVM_TRANSLATE", &["translate_walks_as_a_supervisor_and_sets_accessed_bits"]),
    ioctl(
        "KVM_INTERRUPT",
        &[
            "interrupt_queues_each_vector_once_at_any_time",
            "interrupts_collect_and_the_lowest_comes_first_whatever_cr8_says",
            "a_vector_waits_for_if_and_the_end_of_the_shadow",
            "one_vector_goes_in_at_a_time",
            "a_vector_that_could_not_be_delivered_waits_again",
            "a_vector_beyond_255_is_einval",
        ],
    ),
    ioctl(
        "KVM_DEBUG_GUEST",
        &[
            "debug_guest_steps_and_hides_tf_and_rf",
            "debug_guest_has_four_breakpoints",
            "a_step_gets_past_a_breakpoint",
            "a_step_over_a_port_comes_after_its_exit",
            "a_breakpoint_that_is_not_enabled_is_none",
            "without_debug_guest_the_guests_traps_are_its_own",
        ],
    ),
    ioctl(
        "KVM_GET_MSRS",
        &[
            "get_msrs_returns_how_many_and_copies_all_back",
            "msrs_that_clients_save_come_back",
            "rdmsr_knows_what_2007_knew",
            "no_msr_at_all_is_enomem",
            "lists_that_are_too_long_are_e2big",
        ],
    )
    .but("knows more MSRs, but not the paravirtual 87655678H"),
    ioctl(
        "KVM_SET_MSRS",
        &[
            "set_msrs_returns_how_many",
            "a_bad_efer_counts_as_done_and_is_the_guests_fault",
            "lme_does_not_change_under_paging",
            "msrs_that_clients_save_come_back",
        ],
    ),
    ioctl(
        "KVM_SET_CPUID",
        &[
            "set_cpuid_matches_eax_alone_and_falls_to_the_highest_of_a_half",
            "a_table_without_long_mode_and_nx_forbids_neither",
            "without_a_cpuid_table_leaves_are_zero_and_long_mode_works",
            "lists_that_are_too_long_are_e2big",
        ],
    ),
    ioctl(
        "KVM_SET_SIGNAL_MASK",
        &["the_signal_mask_counts_during_run_alone", "a_signal_set_of_another_size_is_einval"],
    )
    .but("null switches it off, as was meant"),
    ioctl("KVM_GET_FPU", &["get_fpu_and_set_fpu_move_all_but_mxcsr"]),
    ioctl("KVM_SET_FPU", &["get_fpu_and_set_fpu_move_all_but_mxcsr"]),
    exit(
        "KVM_EXIT_UNKNOWN",
        &[
            "exit_unknown_tells_the_hardware_exit_reason",
            "state_that_vm_entry_refuses_is_unknown",
            "blocking_by_sti_without_if_is_unknown",
            "instructions_that_exited_as_unknown_are_executed",
        ],
    )
    .but("for guest state that VM entry refuses; all else is executed"),
    exit(
        "KVM_EXIT_EXCEPTION",
        &["exit_exception_tells_vector_and_error_code", "exceptions_in_real_mode_are_the_guests"],
    )
    .but("for code or descriptor tables where there is no memory; all else is executed"),
    exit("KVM_EXIT_IO", &["exit_io_tells_the_port", "out_shows_eax_and_rip_is_behind_it"])
        .but("port 80H too, as in 2.6.22"),
    exit(
        "KVM_EXIT_HYPERCALL",
        &["exit_hypercall_tells_arguments_and_takes_a_result", "a_hypercall_of_32_bits_has_other_registers"],
    )
    .but("the reason is set, as was meant"),
    exit("KVM_EXIT_DEBUG", &["exit_debug_comes_of_a_step", "debug_guest_has_four_breakpoints"]),
    exit(
        "KVM_EXIT_HLT",
        &[
            "exit_hlt_comes_behind_the_instruction",
            "sti_hlt_exits_ready_and_the_next_run_goes_on",
            "hlt_goes_on_while_a_vector_is_queued_even_without_if",
        ],
    )
    .but("in real mode too"),
    exit("KVM_EXIT_MMIO", &["exit_mmio_tells_the_address", "instructions_of_every_kind_reach_a_device"])
        .but("for every instruction"),
    exit(
        "KVM_EXIT_IRQ_WINDOW_OPEN",
        &[
            "exit_irq_window_open_comes_when_asked_for",
            "request_interrupt_window_exits_when_the_guest_unblocks",
            "a_queued_vector_goes_before_the_window",
        ],
    ),
    exit("KVM_EXIT_SHUTDOWN", &["exit_shutdown_comes_of_a_triple_fault"]),
    exit("KVM_EXIT_FAIL_ENTRY", &["exit_fail_entry_is_not_for_bad_guest_state"]).partly(
        "never seen: it told of control fields or host state that the processor refused, which no client can cause",
    ),
    exit("KVM_EXIT_INTR", &["exit_intr_comes_with_eintr", "a_window_that_is_open_at_entry_is_eintr"]),
    run(
        "request_interrupt_window",
        &[
            "request_interrupt_window_exits_when_the_guest_unblocks",
            "a_window_that_is_open_at_entry_is_eintr",
            "a_request_that_comes_while_the_guest_runs_is_heard",
        ],
    ),
    run("exit_reason", &["nothing_of_kvm_run_is_cleared"]),
    run(
        "ready_for_interrupt_injection",
        &[
            "ready_says_nothing_queued_and_no_shadow",
            "a_device_read_in_a_shadow_is_not_ready",
            "the_write_of_a_read_modify_write_follows_at_once_and_refreshes_nothing",
        ],
    ),
    run(
        "if_flag",
        &[
            "every_return_shows_if_flag_cr8_apic_base_and_ready",
            "the_write_of_a_read_modify_write_follows_at_once_and_refreshes_nothing",
        ],
    ),
    run("cr8", &["every_run_loads_cr8_and_apic_base_is_output_only"]),
    run("apic_base", &["every_run_loads_cr8_and_apic_base_is_output_only", "apic_base_is_stored_and_nothing_more"]),
    run("hw.hardware_exit_reason", &["exit_unknown_tells_the_hardware_exit_reason"]),
    run("fail_entry.hardware_entry_failure_reason", &["exit_fail_entry_is_not_for_bad_guest_state"])
        .partly("never seen, as its exit"),
    run("ex.exception", &["exit_exception_tells_vector_and_error_code"]),
    run("ex.error_code", &["exit_exception_tells_vector_and_error_code"]),
    run("io.direction", &["out_shows_eax_and_rip_is_behind_it", "in_takes_its_bytes_at_the_next_run"]),
    run("io.size", &["out_shows_eax_and_rip_is_behind_it"]),
    run("io.port", &["out_shows_eax_and_rip_is_behind_it"]),
    run(
        "io.count",
        &[
            "rep_outs_goes_to_the_end_of_the_page_and_on",
            "one_exit_takes_up_to_a_page",
            "without_rep_the_count_is_1_whatever_rcx_says",
            "the_count_is_cut_to_the_address_size",
            "a_count_of_0_makes_no_exit",
            "an_element_over_a_page_end_is_done_alone",
            "downwards_elements_come_one_by_one",
        ],
    )
    .but("DF = 1 works, element by element"),
    run(
        "io.data_offset",
        &[
            "an_untouched_data_page_gives_eax_back_to_in",
            "rep_ins_stores_what_the_data_page_has_at_the_next_run",
            "in_of_a_doubleword_clears_the_upper_half_of_rax",
            "a_run_that_ends_in_eintr_has_completed_the_io",
            "a_buffer_that_is_not_mapped_is_a_page_fault",
            "a_buffer_in_a_device_takes_both_exits",
            "a_reset_from_inside_a_string_exit_drops_the_rest",
            "an_interrupt_comes_between_two_exits_of_one_instruction",
            "ins_to_a_device_writes_each_element_there",
        ],
    )
    .but("IN of a doubleword clears RAX bits 63:32"),
    run("debug", &["exit_debug_comes_of_a_step"]),
    run("mmio.phys_addr", &["exit_mmio_tells_the_address", "a_read_waits_at_its_instruction"]),
    run(
        "mmio.data",
        &[
            "a_read_waits_at_its_instruction",
            "a_write_is_over_when_it_is_reported",
            "a_run_that_ends_in_eintr_has_completed_the_read",
        ],
    ),
    run(
        "mmio.len",
        &[
            "a_write_is_over_when_it_is_reported",
            "an_access_over_a_page_end_comes_in_natural_parts",
            "the_part_of_an_access_that_is_ram_makes_no_exit",
        ],
    )
    .but("1, 2, 4 or 8, and every part of an access over a page end"),
    run(
        "mmio.is_write",
        &[
            "rep_movs_from_device_to_device_is_a_read_and_a_write_each",
            "rep_stos_to_a_device_is_an_exit_for_each",
            "instructions_that_only_compare_do_not_write",
        ],
    )
    .but("what only compares writes nothing back"),
    run("hypercall.args", &["exit_hypercall_tells_arguments_and_takes_a_result"]),
    run("hypercall.ret", &["exit_hypercall_tells_arguments_and_takes_a_result"]),
    run("hypercall.longmode", &["a_hypercall_of_32_bits_has_other_registers"]),
    of("KVM_API_VERSION", &["get_api_version_is_12_and_takes_no_argument"]),
    of("KVM_NR_INTERRUPTS", &["a_vector_beyond_255_is_einval"]),
    of("KVM_IRQ_BITMAP_SIZE", &["set_sregs_replaces_queued_vectors"]),
    of("KVM_MEM_LOG_DIRTY_PAGES", &["the_same_place_with_other_flags_keeps_contents_and_log"]),
    of("KVM_EXIT_IO_IN", &["in_takes_its_bytes_at_the_next_run"]),
    of("KVM_EXIT_IO_OUT", &["out_shows_eax_and_rip_is_behind_it"]),
    of("struct kvm_memory_region", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_memory_alias", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_run", &["fields_are_where_the_header_has_them"]),
    of("struct kvm_regs", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_fpu", &["fields_are_where_the_header_has_them"]),
    of("struct kvm_segment", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_dtable", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_sregs", &["fields_are_where_the_header_has_them"]),
    of("struct kvm_msr_entry", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_msrs", &["get_msrs_returns_how_many_and_copies_all_back"]),
    of("struct kvm_msr_list", &["get_msr_index_list_tells_the_total_before_e2big"]),
    of("struct kvm_translation", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_interrupt", &["interrupt_queues_each_vector_once_at_any_time"]),
    of("struct kvm_breakpoint", &["a_breakpoint_that_is_not_enabled_is_none"]),
    of("struct kvm_debug_guest", &["fields_are_where_the_header_has_them"])
        .but("EINVAL for the 76 bytes of an i386 caller, as then"),
    of("struct kvm_dirty_log", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_cpuid_entry", &["structures_have_the_sizes_of_2007"]),
    of("struct kvm_cpuid", &["lists_that_are_too_long_are_e2big"]),
    of("struct kvm_signal_mask", &["a_signal_set_of_another_size_is_einval"]),
];
