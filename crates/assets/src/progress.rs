//! What is going on, on stderr: a spinner or a bar where a human looks, a line per step elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::Progress;

/// One line that always shows the current step.
pub struct Bar {
    bar: ProgressBar,
    terminal: bool,
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Bar {
    /// Shows nothing until the first step.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar, terminal }
    }

    /// What the current step is at, for a human alone.
    pub fn detail(&self, what: &str) {
        if self.terminal {
            self.bar.set_message(what.to_owned());
        }
    }

    /// Takes the line away; what is printed next begins in column one.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates below are constant")
}

impl Progress for Bar {
    fn step(&self, what: &str) {
        if !self.terminal {
            eprintln!("{what}");
            return;
        }
        self.bar.reset();
        self.bar.set_style(style("{spinner} {msg} ({elapsed})"));
        self.bar.set_message(what.to_owned());
    }

    fn bytes(&self, done: u64, total: u64) {
        if total > 0 {
            self.bar.set_style(style("{spinner} {msg} {wide_bar} {bytes}/{total_bytes} ({eta} left)"));
            self.bar.set_length(total);
            self.bar.set_position(done.min(total));
        }
    }
}
