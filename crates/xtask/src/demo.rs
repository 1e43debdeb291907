//! `cargo xtask demo`: Debian's kernel in Debian's QEMU on softkvm's /dev/kvm, from nothing to user space.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use assets::progress::Bar;
use assets::qemu::{Accel, Machine};
use assets::{initramfs, kernel, packages};
use clap::ValueEnum;
use softkvm_tests::softkvm;
use softkvm_tests::summary::Summary;

use crate::console;

/// Boot Debian's cloud kernel in an unmodified QEMU on softkvm, and show the console.
///
/// Installs qemu-system-x86 and busybox-static if they are missing, downloads Debian's kernel package into the cache
/// (never installing it here), builds softkvm and boots. Ends with status 0 only if the guest reached user space and
/// powered off.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask demo            boot, print BOOTED and the uptime, power off\n  \
                        cargo xtask demo --shell    boot and leave you at the guest's prompt\n\n\
                        The cache is $SOFTKVM_CACHE, else $XDG_CACHE_HOME/softkvm, else ~/.cache/softkvm.")]
pub(crate) struct Args {
    /// Stay at the guest's prompt; `exit` there powers the guest off, Ctrl-A X ends QEMU
    #[arg(long)]
    shell: bool,
    /// RAM of the guest
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(64..=65536))]
    memory: u32,
    /// More options for the guest's kernel, behind `console=ttyS0 panic=-1`
    #[arg(long, value_name = "OPTIONS", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    append: String,
    /// What executes the guest: softkvm, or QEMU's own JIT to compare with
    #[arg(long, value_enum, default_value_t = Executor::Kvm, hide = true)]
    accel: Executor,
    /// Options for `softkvm run`
    #[arg(long, value_name = "OPTION", hide = true, allow_hyphen_values = true)]
    softkvm: Vec<OsString>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Executor {
    Kvm,
    Tcg,
}

/// True if the guest reached user space and powered off.
pub(crate) fn run(args: &Args) -> Result<bool> {
    // Before anything is downloaded: what no download can cure.
    if args.accel == Executor::Kvm {
        softkvm::require_host()?;
    }
    let bar = Bar::new();
    packages::ensure(&[packages::QEMU], &bar)?;
    let kernel = kernel::ensure(&bar)?;
    let initrd = initramfs::ensure(&bar)?;
    bar.finish();

    let mut options = args.append.clone();
    if args.shell {
        options = format!("{} {options}", initramfs::SHELL_OPTION);
    }
    let accel = if args.accel == Executor::Kvm { Accel::Kvm } else { Accel::Tcg };
    let machine = Machine::new(accel, args.memory).linux(&kernel.image(), &initrd, &options);
    let report = tempfile("summary.json")?;
    let mut command = match args.accel {
        Executor::Tcg => machine.command(),
        Executor::Kvm => {
            eprintln!("building softkvm (release)");
            let mut softkvm_options = vec![OsString::from("--summary"), report.clone().into_os_string()];
            softkvm_options.extend(args.softkvm.iter().cloned());
            softkvm::run(&softkvm_options, &machine.command_line())?
        }
    };
    eprintln!("booting {} with {} MiB; the guest's console follows", kernel.release, args.memory);

    let started = Instant::now();
    let (seen, status) = watch(&mut command, args.shell)?;
    let wall = started.elapsed();

    println!();
    match Summary::read(&report) {
        Ok(summary) => print_summary(wall, Some(&summary)),
        Err(error) => {
            print_summary(wall, None);
            if args.accel == Executor::Kvm {
                eprintln!("warning: {error:#}");
            }
        }
    }
    let _ = std::fs::remove_file(&report);
    if !status.success() {
        eprintln!("error: {} ended with {status}", command.get_program().display());
    }
    if !seen.booted {
        eprintln!("error: the guest did not reach user space (no line with {})", initramfs::BOOTED);
    } else if !seen.powered_off {
        eprintln!("error: the guest did not power off by itself");
    }
    Ok(status.success() && seen.booted && seen.powered_off)
}

/// Runs the VMM to its end with its console on ours.
fn watch(command: &mut Command, shell: bool) -> Result<(console::Seen, std::process::ExitStatus)> {
    // Without --shell nobody types, and Ctrl-C stays what it is: QEMU makes a terminal on its stdin raw.
    let stdin = if shell { Stdio::inherit() } else { Stdio::null() };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let mut guest = child.stdout.take().expect("piped above");
    let seen = console::show(&mut guest, &mut std::io::stdout(), shell)?;
    if shell {
        // SeaBIOS turned line wrap off; the user's next prompt wants it back.
        print!("\x1b[?7h");
    }
    let status = child.wait().context("waiting for the VMM")?;
    Ok((seen, status))
}

fn tempfile(name: &str) -> Result<PathBuf> {
    let dir = assets::cache()?;
    let path = dir.join(format!("{}-{name}", std::process::id()));
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("cannot remove {}: {error}", path.display())
        }
        _ => Ok(path),
    }
}

fn print_summary(wall: Duration, summary: Option<&Summary>) {
    println!("wall time           {:>14.2} s", wall.as_secs_f64());
    let Some(summary) = summary else { return };
    println!("inside KVM_RUN      {:>14.2} s", summary.run().as_secs_f64());
    println!("guest instructions  {:>14}", grouped(summary.instructions));
    println!("speed               {:>14.0} MIPS", summary.mips());
    for (title, counts) in
        [("exits by VMX reason", &summary.exits.vmx), ("exits by kvm_run reason", &summary.exits.kvm_run)]
    {
        println!("\n{title}");
        let mut rows: Vec<_> = counts.iter().filter(|(_, n)| **n > 0).collect();
        rows.sort_by(|a, b| b.1.cmp(a.1));
        for (name, count) in rows {
            println!("  {name:<28} {:>12}", grouped(*count));
        }
    }
}

/// 1234567 → 1,234,567
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
