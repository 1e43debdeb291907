//! `softkvm profile` beside guests of which it is known what they do.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use softkvm_tests::inside::inside;
use softkvm_tests::{eventually, softkvm};
use tiny_vmm::code_asm::*;
use tiny_vmm::{CODE, End, Guest, Mode, VcpuExit, assemble};

const RAM: usize = 2 << 20;
const WITHIN: Duration = Duration::from_secs(240);

fn output(line: &[&str]) -> Output {
    let output = Command::new(softkvm::binary().expect("a binary")).args(line).output().expect("softkvm starts");
    assert!(output.status.success(), "{line:?}: {output:?}");
    output
}

fn text(line: &[&str]) -> String {
    String::from_utf8(output(line).stdout).expect("text")
}

fn json(line: &[&str]) -> Value {
    serde_json::from_slice(&output(line).stdout).expect("JSON")
}

/// The names of all fields, those of maps left out.
fn fields(value: &Value, all: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                all.push(name.clone());
                if !matches!(name.as_str(), "vmx_exits" | "kvm_exits") {
                    fields(value, all);
                }
            }
        }
        Value::Array(array) => array.iter().for_each(|value| fields(value, all)),
        _ => {}
    }
}

#[test]
fn the_known_loop_is_the_hottest_code() {
    inside("profile::the_known_loop_is_the_hottest_code", WITHIN, || {
        let code = assemble(Mode::Long, |a| {
            let mut top = a.create_label();
            a.mov(ebx, 7)?;
            a.set_label(&mut top)?;
            a.inc(eax)?;
            a.imul_2(ecx, ebx)?;
            a.xor(edx, dword_ptr(0x9000))?;
            a.add(ecx, 5)?;
            a.jmp(top)
        })
        .expect("a loop assembles");
        // MOV EBX, imm32 has five bytes (SDM Vol. 2 "MOV": B8+rd id).
        let top_at = CODE + 5;
        let mut guest = Guest::new(Mode::Long, RAM, &code).expect("a guest");
        let both = thread::spawn(|| {
            let document = json(&["profile", "--seconds", "2", "--json"]);
            (document, text(&["profile", "--seconds", "0.5", "--vm", "1", "--top", "1"]))
        });
        while !both.is_finished() {
            assert_eq!(guest.run_until_end(Duration::from_millis(200)), End::Interrupted);
        }
        let (document, shown) = both.join().expect("no panic");

        let vms = document["vms"].as_array().expect("a list");
        assert_eq!((vms.len(), &vms[0]["owner_pid"]), (1, &std::process::id().into()), "{document:#}");
        let vm = &vms[0];
        let hottest = &vm["traces"][0];
        assert_eq!(hottest["address"], format!("{top_at:#x}"), "{document:#}");
        let plain = [&hottest["ip"], &hottest["bitness"], &hottest["cpl"], &hottest["alone"], &hottest["instructions"]];
        assert_eq!(plain, [&hottest["address"], &64.into(), &0.into(), &false.into(), &5.into()]);
        let column = |name: &str| -> Vec<String> {
            let lines = hottest["code"].as_array().expect("a list").iter();
            lines.map(|line| line[name].as_str().expect("a text").to_owned()).collect()
        };
        let bytes: String = code[5..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(column("bytes").concat(), bytes);
        let texts = column("text");
        assert_eq!(texts[..2], ["inc eax", "imul ecx,ebx"], "{texts:?}");
        assert!(texts[2].starts_with("xor edx,") && texts[3].starts_with("add ecx,"), "{texts:?}");
        assert!(texts[4].starts_with("jmp ") && texts[4].contains(&format!("{top_at:X}h")), "{texts:?}");
        let share = hottest["share"].as_f64().expect("a number");
        assert!(share > 0.9 && vm["samples"].as_u64() >= Some(5), "{document:#}");
        for line in hottest["code"].as_array().expect("a list") {
            assert!((line["share"].as_f64().expect("a number") - share / 5.0).abs() < 1e-6, "{document:#}");
        }
        let mut names: Vec<_> = vm["mnemonics"].as_array().expect("a list")[..5].iter().collect();
        names.sort_by_key(|hot| hot["mnemonic"].as_str());
        let names: Vec<_> = names.iter().map(|hot| hot["mnemonic"].as_str().expect("a text")).collect();
        assert_eq!(names, ["add", "imul", "inc", "jmp", "xor"]);

        let vcpu = &vm["vcpus"][0];
        let (seconds, mips) =
            (document["seconds"].as_f64().expect("a number"), vcpu["mips"].as_f64().expect("a number"));
        let instructions = vcpu["counts"]["instructions"].as_u64().expect("a number");
        assert!(seconds > 0.0 && instructions > 100_000, "{document:#}");
        assert!((mips - instructions as f64 / seconds / 1e6).abs() < 0.01, "{document:#}");
        // The VMM's alarm is the only reason to leave.
        assert_eq!(vcpu["vmx_exits"].as_object().expect("a map").keys().collect::<Vec<_>>(), ["EXTERNAL_INTERRUPT"]);

        assert!(shown.contains("VM 1 of pid ") && shown.contains(" MIPS, "), "{shown}");
        assert!(shown.contains(&format!("{top_at:#x} 64-bit CPL 0 CR3 ")) && shown.contains("imul ecx,ebx"), "{shown}");

        // What the document has is what the help says, and no more.
        let mut all = Vec::new();
        fields(&document, &mut all);
        let help = text(&["profile", "--help"]);
        let words: Vec<&str> = help.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        for field in all {
            assert!(words.contains(&field.as_str()), "{field} is not in\n{help}");
        }
        let daemon = &json(&["status", "--json"])["daemons"][0]["pid"];
        let socket = fs::metadata(format!("/run/softkvm/{daemon}.profile")).expect("the socket");
        assert_eq!((socket.permissions().mode() & 0o777, socket.uid()), (0o600, 0), "root's alone, as that of status");
    });
}

#[test]
fn what_a_guest_does_a_known_number_of_times_is_counted() {
    inside("profile::what_a_guest_does_a_known_number_of_times_is_counted", WITHIN, || {
        const ROUNDS: u32 = 100;
        let code = assemble(Mode::Long, |a| {
            let (mut top, mut target) = (a.create_label(), a.create_label());
            a.mov(ecx, ROUNDS)?;
            a.set_label(&mut top)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.invlpg(ptr(0x10_0000))?;
            a.lea(rsi, ptr(target))?;
            a.mov(byte_ptr(rsi + 1), cl)?;
            a.set_label(&mut target)?;
            a.mov(ebx, 1)?;
            a.out(0x80, al)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.hlt()
        })
        .expect("a loop assembles");
        let daemon = json(&["status", "--json"])["daemons"][0]["pid"].clone();
        let profile = thread::spawn(|| json(&["profile", "--seconds", "4", "--json"]));
        let begun = || {
            let threads = fs::read_dir(format!("/proc/{daemon}/task")).expect("the daemon lives").flatten();
            threads
                .map(|at| fs::read_to_string(at.path().join("comm")))
                .any(|name| name.is_ok_and(|is| is == "profile\n"))
        };
        assert!(eventually(Duration::from_secs(60), begun), "no profile is taken");

        let mut guest = Guest::new(Mode::Long, RAM, &code).expect("a guest");
        let mut outs = 0;
        loop {
            match guest.run().expect("KVM_RUN") {
                VcpuExit::IoOut(0x80, _) => outs += 1,
                VcpuExit::Hlt => break,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(outs, ROUNDS);
        let document = profile.join().expect("no panic");
        drop(guest);

        let vcpu = &document["vms"][0]["vcpus"][0];
        let count = |name: &str| vcpu["counts"][name].as_u64().unwrap_or_else(|| panic!("no {name}: {document:#}"));
        let rounds = u64::from(ROUNDS);
        // HLT is one of them.
        assert_eq!(count("instructions"), 1 + 9 * rounds + 1, "{document:#}");
        assert_eq!(count("page_flushes"), rounds, "{document:#}");
        // One for each MOV to CR3; loading the state that the VMM sets takes a few.
        assert!((rounds..rounds + 20).contains(&count("tlb_flushes")), "{document:#}");
        // The first may come before anything of its target has been decoded.
        assert!((rounds - 1..=rounds).contains(&count("code_writes")), "{document:#}");
        assert!(count("traces_dropped") >= rounds - 1 && count("traces_decoded") >= rounds, "{document:#}");
        // The page that is stored to is code, which no TLB entry for writes names.
        assert!(count("data_walks") >= rounds && count("fetch_walks") >= rounds, "{document:#}");
        assert_eq!([count("interrupts"), count("nmis"), count("exceptions"), count("arena_resets")], [0; 4]);
        let exits = |kind: &str| serde_json::to_string(&vcpu[kind]).expect("JSON");
        assert_eq!(exits("vmx_exits"), format!(r#"{{"HLT":1,"IO_INSTRUCTION":{ROUNDS}}}"#));
        assert_eq!(exits("kvm_exits"), format!(r#"{{"HLT":1,"IO":{ROUNDS}}}"#));
    });
}
