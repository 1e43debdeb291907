//! `cargo xtask test`: everything that must hold before a change lands, as named steps.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use assets::packages;
use assets::progress::Bar;
use clap::ValueEnum;

use crate::cargo::cargo;

/// Run every check that a change must pass: formatting, lints, tests, documentation.
///
/// All steps run even when one fails; the table at the end says which did, and how to run that one alone.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask test               everything\n  cargo xtask test unit clippy   \
                        two steps\n  cargo xtask test --long        with the longer forms of the tests")]
pub(crate) struct Args {
    /// Steps to run [default: all of them]
    #[arg(value_enum)]
    steps: Vec<Step>,
    /// Run the longer form of every test that has one (more rounds, larger tables)
    #[arg(long)]
    long: bool,
    /// Stop at the first step that fails
    #[arg(long)]
    fail_fast: bool,
}

/// One thing that is checked.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Step {
    /// Formatting: `cargo fmt`
    Fmt,
    /// Lints: `cargo clippy`, warnings are errors
    Clippy,
    /// The tests beside the code, of every crate that starts no guests
    Unit,
    /// The whole-system tests in `tests/` and `benches/`: VMMs as clients of the release build
    System,
    /// Documentation: `cargo doc`, warnings are errors
    Doc,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Fmt => "fmt",
            Step::Clippy => "clippy",
            Step::Unit => "unit",
            Step::System => "system",
            Step::Doc => "doc",
        }
    }

    /// What the step runs, in order; all must end with status 0.
    fn commands(self) -> Vec<Command> {
        match self {
            Step::Fmt => vec![cargo(["fmt", "--all", "--", "--check"])],
            Step::Clippy => vec![cargo(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"])],
            Step::Unit => {
                let clients = ["--exclude", "softkvm-tests", "--exclude", "softkvm-benches"];
                vec![cargo(["test", "--workspace", "--no-fail-fast"].iter().chain(&clients))]
            }
            Step::System => vec![
                cargo(["build", "--release", "--package", "cuse-daemon"]),
                cargo(["test", "--package", "softkvm-tests", "--package", "softkvm-benches", "--no-fail-fast"]),
            ],
            Step::Doc => {
                let mut doc = cargo(["doc", "--workspace", "--no-deps", "--document-private-items", "--quiet"]);
                doc.env("RUSTDOCFLAGS", "-D warnings");
                vec![doc]
            }
        }
    }
}

/// What libtest said, summed over test programs.
#[derive(Default)]
struct Results {
    passed: u64,
    failed: u64,
    /// Tests that failed.
    names: Vec<String>,
    /// Test programs that ended without a result.
    died: u64,
    /// Between `running 5 tests` and the `test result: …` that belongs to it.
    running: bool,
    /// Below `failures:`, where the names stand.
    listing: bool,
}

struct Done {
    step: Step,
    ok: bool,
    results: Results,
    took: Duration,
}

/// True if every step passed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let steps = if args.steps.is_empty() { Step::value_variants() } else { &args.steps };
    let started = Instant::now();
    if steps.contains(&Step::System) {
        let bar = Bar::new();
        packages::ensure(packages::ALL, &bar)?;
        bar.finish();
    }
    let mut done: Vec<Done> = Vec::new();
    for (index, &step) in steps.iter().enumerate() {
        println!("==> {} ({} of {})", step.name(), index + 1, steps.len());
        let begin = Instant::now();
        let mut results = Results::default();
        let mut ok = true;
        for command in step.commands() {
            if !follow(command, args.long, &mut results)? {
                ok = false;
                break;
            }
        }
        let took = begin.elapsed();
        println!("    {}: {} in {:.1} s\n", step.name(), if ok { "ok" } else { "FAILED" }, took.as_secs_f64());
        done.push(Done { step, ok, results, took });
        if !ok && args.fail_fast {
            break;
        }
    }
    Ok(summary(&done, steps.len(), args.long, started.elapsed()))
}

fn summary(done: &[Done], wanted: usize, long: bool, took: Duration) -> bool {
    let passed: u64 = done.iter().map(|d| d.results.passed).sum();
    let failed: u64 = done.iter().map(|d| d.results.failed).sum();
    let bad: Vec<_> = done.iter().filter(|d| !d.ok).collect();
    println!("step      result     seconds");
    for d in done {
        println!("{:<9} {:<9} {:>8.1}", d.step.name(), if d.ok { "ok" } else { "FAILED" }, d.took.as_secs_f64());
    }
    for d in &bad {
        for name in &d.results.names {
            println!("failed in {}: {name}", d.step.name());
        }
        if d.results.died > 0 {
            println!("failed in {}: {} test program(s) that ended without a result", d.step.name(), d.results.died);
        }
        let long = if long { " --long" } else { "" };
        println!("{0} failed; alone it runs with: cargo xtask test {0}{long}", d.step.name());
    }
    let verdict = if bad.is_empty() && done.len() == wanted { "ok" } else { "FAILED" };
    println!(
        "cargo xtask test: {verdict}. {} of {wanted} steps ok; {passed} passed, {failed} failed; finished in {:.0} s",
        done.len() - bad.len(),
        took.as_secs_f64()
    );
    bad.is_empty() && done.len() == wanted
}

/// Runs `command`, passes its output on line by line and adds up what libtest says.
fn follow(mut command: Command, long: bool, results: &mut Results) -> Result<bool> {
    if long {
        command.env("SOFTKVM_TEST_LONG", "1");
    }
    let shown = format!("{command:?}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {shown}"))?;
    let stdout = child.stdout.take().expect("piped above");
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("reading the output of cargo")?;
        let line = String::from_utf8_lossy(&line);
        results.add(&line);
        // A closed pipe on our side must not stop the tests half way.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    results.end();
    Ok(child.wait().with_context(|| format!("waiting for {shown}"))?.success())
}

impl Results {
    /// A test program begins with `running 5 tests`, lists names below `failures:`, indented, and ends with
    /// `test result: ok. 5 passed; 0 failed; 0 ignored; …`.
    fn add(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("    ").filter(|_| self.listing) {
            self.names.push(name.to_owned());
            return;
        }
        self.listing = line == "failures:";
        if let Some(result) = line.strip_prefix("test result: ") {
            self.running = false;
            let words: Vec<&str> = result.split([' ', ';', '.']).filter(|w| !w.is_empty()).collect();
            for pair in words.windows(2) {
                match (pair[0].parse::<u64>(), pair[1]) {
                    (Ok(n), "passed") => self.passed += n,
                    (Ok(n), "failed") => self.failed += n,
                    _ => {}
                }
            }
        } else if line.strip_prefix("running ").is_some_and(|rest| rest.ends_with(" tests") || rest.ends_with(" test"))
        {
            self.end();
            self.running = true;
        }
    }

    /// The program that ran last is over.
    fn end(&mut self) {
        self.died += u64::from(std::mem::take(&mut self.running));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(output: &str) -> Results {
        let mut results = Results::default();
        output.lines().for_each(|line| results.add(line));
        results.end();
        results
    }

    #[test]
    fn counts_are_taken_from_result_lines_only() {
        let results = results(
            "running 13 tests\n\
             test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.50s\n\
             running 5 tests\n\
             test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.50s\n\
             running 7 passed tests",
        );
        assert_eq!((results.passed, results.failed), (15, 2));
    }

    /// As libtest prints it: the names stand below the second `failures:`, behind what each test wrote.
    #[test]
    fn failed_tests_are_named_and_dead_programs_counted() {
        let results = results(
            "running 3 tests\ntest a::one ... ok\ntest a::two ... FAILED\ntest a::three ... FAILED\n\n\
             failures:\n\n---- a::two stdout ----\n    an indented line\n\n\
             failures:\n    a::two\n    a::three\n\n\
             test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             running 1 test\n\
             running 1 test\ntest ok ... ok\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        assert_eq!((results.names, results.died), (vec!["a::two".to_owned(), "a::three".to_owned()], 1));
    }
}
