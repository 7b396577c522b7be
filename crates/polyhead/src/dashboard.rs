//! `train --tui`: Burn's terminal dashboard (burn-train), fed by our loop.
//!
//! Two things differ from how burn-train uses it. Our runs have steps, not epochs: a run is shown as one epoch whose items
//! are steps. And the dashboard switches the terminal's signal keys off, so that Ctrl-C would do nothing; they are
//! switched on again, and its keys for stopping do what a signal does: save, then leave with exit code 130.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use burn_train::Interrupter;
use burn_train::logger::TrainingProgressLogger;
use burn_train::metric::{
    MetricAttributes, MetricDefinition, MetricEntry, MetricId, NumericAttributes, NumericEntry, SerializedEntry,
};
use burn_train::renderer::tui::TuiMetricsRendererWrapper;
use burn_train::renderer::{MetricState, MetricsRenderer, MetricsRendererTraining};
use polyhead_models::Evaluated;
use polyhead_training::run::{Logged, Requests, View};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::console::thousands;
use polyhead_recipe::Problems;

/// How long to wait for the dashboard to take the terminal.
const OPENING: Duration = Duration::from_secs(2);
/// What ends its mouse reports and its second screen, and shows the cursor again.
const LEAVE: &[u8] = b"\x1b[?1006l\x1b[?1015l\x1b[?1003l\x1b[?1002l\x1b[?1000l\x1b[?1049l\x1b[?25h";

/// Whether it can be shown.
///
/// # Errors
/// If there is no terminal.
pub fn check() -> Result<(), Problems> {
    if io::stdin().is_terminal() && io::stdout().is_terminal() {
        return Ok(());
    }
    Err(Problems::plain("--tui needs a terminal for input and output; leave it out for plain lines".into()))
}

/// Shows a run.
pub struct Dashboard {
    // `None` once its kill key was used.
    renderer: Option<TuiMetricsRendererWrapper>,
    interrupter: Interrupter,
    requests: Arc<Requests>,
    registered: BTreeSet<&'static str>,
}

enum Split {
    Train,
    Validation,
}

impl Dashboard {
    /// Takes the terminal until it is dropped. The run has `steps` steps and looks at `requests`.
    pub fn open(steps: u64, requests: Arc<Requests>) -> Self {
        let interrupter = Interrupter::new();
        let mut renderer = TuiMetricsRendererWrapper::new(interrupter.clone(), None);
        renderer.start(1, 1, None, Some("one item is one step"));
        renderer.start_split("train", steps as usize);
        terminal::wait_until_taken(OPENING);
        Self { renderer: Some(renderer), interrupter, requests, registered: BTreeSet::new() }
    }

    /// Tells the dashboard something, and hears whether one of its keys was used.
    fn tell(&mut self, tell: impl FnOnce(&mut TuiMetricsRendererWrapper)) {
        terminal::keep_signal_keys();
        if let Some(mut renderer) = self.renderer.take() {
            // The kill key gives the terminal back and makes the next call panic. The run is saved even then.
            match catch_unwind(AssertUnwindSafe(|| tell(&mut renderer))) {
                Ok(()) => self.renderer = Some(renderer),
                Err(_) => {
                    std::mem::forget(renderer); // dropping it would panic too
                    self.interrupter.stop(None);
                }
            }
        }
        if self.interrupter.should_stop() {
            // A signal that came before stays what ended the run.
            let _ = self.requests.stop.compare_exchange(0, SIGINT as usize, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    fn show(&mut self, split: Split, name: &'static str, value: f64, text: String) {
        let id = MetricId::new(Arc::new(name.to_owned()));
        let new = self.registered.insert(name);
        self.tell(|renderer| {
            if new {
                let attributes = MetricAttributes::Numeric(NumericAttributes::default());
                let name = Arc::new(name.to_owned());
                renderer.register_metric(MetricDefinition {
                    metric_id: id.clone(),
                    name,
                    description: None,
                    attributes,
                });
            }
            let point = value.is_finite().then_some(NumericEntry::Value(value));
            let entry = MetricEntry::new(id, SerializedEntry::new(text, value.to_string()));
            match split {
                Split::Train => renderer.update_train(MetricState::Numeric(entry, point)),
                Split::Validation => renderer.update_valid(MetricState::Numeric(entry, point)),
            }
        });
    }
}

impl View for Dashboard {
    fn stepped(&mut self, step: &Logged) {
        let Logged { loss, bits_per_byte, grad_norm, lr, tokens_per_second, .. } = *step;
        self.show(Split::Train, "loss", loss, format!("{loss:.4}"));
        if let Some(bits) = bits_per_byte {
            self.show(Split::Train, "bits per byte", bits, format!("{bits:.3}"));
        }
        self.show(Split::Train, "grad_norm", grad_norm, format!("{grad_norm:.2}"));
        self.show(Split::Train, "learning rate", lr, format!("{lr:.2e}"));
        self.show(Split::Train, "tokens/s", tokens_per_second, thousands(tokens_per_second as u64));
        self.tell(|renderer| {
            renderer.update_split(step.step as usize);
            if step.skipped {
                renderer.log_event_training("skipped".into());
            }
        });
    }

    fn validated(&mut self, _step: u64, sums: &Evaluated) {
        let (loss, accuracy) = (sums.mean_loss(), 100.0 * sums.accuracy());
        self.show(Split::Validation, "loss", loss, format!("{loss:.4}"));
        if let Some(bits) = sums.bits_per_byte() {
            self.show(Split::Validation, "bits per byte", bits, format!("{bits:.3}"));
        }
        self.show(Split::Validation, "accuracy in %", accuracy, format!("{accuracy:.1} %"));
    }

    fn saved(&mut self, _step: u64) {
        self.tell(|renderer| renderer.log_event_training("saved".into()));
    }

    fn note(&mut self, note: &str) {
        self.tell(|renderer| renderer.log_event_training(note.into()));
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let renderer = self.renderer.take();
        // Closing it may meet its kill key too; then the terminal has been given back already.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(renderer)));
    }
}

/// A second signal ends the process at once: the terminal has to be given back even then. Call it before the handler that
/// ends the process is installed; `armed` is true from the first signal on.
///
/// # Errors
/// If a handler cannot be installed.
pub fn give_terminal_back(armed: &Arc<AtomicBool>) -> io::Result<()> {
    let settings = terminal::Settings::now();
    for signal in [SIGINT, SIGTERM] {
        let (armed, settings) = (armed.clone(), settings.clone());
        let give_back = move || {
            if armed.load(Ordering::SeqCst) {
                settings.restore();
            }
        };
        // SAFETY: an atomic load, tcsetattr and write are all that it does; signal handlers may do these.
        unsafe { signal_hook::low_level::register(signal, give_back) }?;
    }
    Ok(())
}

#[cfg(unix)]
mod terminal {
    use std::time::{Duration, Instant};

    /// The terminal's settings before the dashboard.
    #[derive(Clone)]
    pub struct Settings(Option<libc::termios>);

    impl Settings {
        /// As they are now.
        pub fn now() -> Self {
            // SAFETY: termios is plain numbers, for which zeros are valid; tcgetattr fills it or fails.
            let mut settings: libc::termios = unsafe { std::mem::zeroed() };
            let read = unsafe { libc::tcgetattr(libc::STDIN_FILENO, &mut settings) } == 0;
            Self(read.then_some(settings))
        }

        /// Puts them back. Fit for signal handlers.
        pub fn restore(&self) {
            let Some(settings) = &self.0 else { return };
            // SAFETY: both calls only read what they are given.
            unsafe {
                libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, settings);
                libc::write(libc::STDOUT_FILENO, super::LEAVE.as_ptr().cast(), super::LEAVE.len());
            }
        }
    }

    /// Returns once the dashboard has switched the signal keys off, with Ctrl-C switched on again.
    pub fn wait_until_taken(at_most: Duration) {
        let started = Instant::now();
        while !keep_signal_keys() && started.elapsed() < at_most {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Makes Ctrl-C a signal again if it is none; whether it was none. Keys that suspend the process or make it dump core
    /// stay off: the screen would be left as it is.
    pub fn keep_signal_keys() -> bool {
        let Settings(Some(mut settings)) = Settings::now() else { return false };
        if settings.c_lflag & libc::ISIG != 0 {
            return false;
        }
        settings.c_lflag |= libc::ISIG;
        settings.c_cc[libc::VSUSP] = libc::_POSIX_VDISABLE;
        settings.c_cc[libc::VQUIT] = libc::_POSIX_VDISABLE;
        // SAFETY: tcsetattr only reads the settings, which tcgetattr made.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &settings) == 0 }
    }
}

#[cfg(not(unix))]
mod terminal {
    use std::time::Duration;

    /// Nothing to keep: only Unix terminals lose their signal keys.
    #[derive(Clone)]
    pub struct Settings;

    impl Settings {
        /// Nothing.
        pub fn now() -> Self {
            Self
        }

        /// Does nothing.
        pub fn restore(&self) {}
    }

    /// Does nothing.
    pub fn wait_until_taken(_at_most: Duration) {}

    /// Does nothing.
    pub fn keep_signal_keys() -> bool {
        false
    }
}
