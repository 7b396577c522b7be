//! Signals to a run: save and leave (SIGINT, SIGTERM, SIGHUP of a connection that drops, and SIGUSR2, which mpirun passes on at
//! once), or save and go on (SIGUSR1, as schedulers send it). A thread of its own waits for them, so that they are answered
//! whatever the run is busy with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polyhead_training::run::Requests;

use polyhead_runs::Failure;

/// What signals asked for, and how the next one is taken.
#[derive(Clone)]
pub struct Signals {
    /// What is asked of the run.
    pub requests: Arc<Requests>,
    /// Whether there is something to save: then a signal waits until it is.
    busy: Arc<AtomicBool>,
}

/// While it lives, a signal waits until the run is saved.
pub struct Busy<'a>(&'a Signals);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::SeqCst);
    }
}

impl Signals {
    /// From here on there is something to save. Before, and once what is returned is dropped, a signal ends the process at
    /// once: everything is on the disk.
    pub fn busy(&self) -> Busy<'_> {
        self.busy.store(true, Ordering::SeqCst);
        Busy(self)
    }

    /// The number of the signal to leave with; 0 for none.
    pub fn stop(&self) -> usize {
        self.requests.stop.load(Ordering::SeqCst)
    }
}

/// Listens from now on. A second signal to leave ends the process at once.
///
/// # Errors
/// If a handler cannot be installed.
#[cfg_attr(not(feature = "tui"), allow(unused_variables))] // what the dashboard needs
pub fn listen(dashboard: bool) -> Result<Signals, Failure> {
    let signals = Signals { requests: Arc::default(), busy: Arc::default() };
    let armed = Arc::new(AtomicBool::new(false));
    #[cfg(feature = "tui")]
    if dashboard {
        crate::dashboard::give_terminal_back(&armed)?;
    }
    system::wait(signals.clone(), armed, dashboard)?;
    Ok(signals)
}

/// Makes a write beyond the limit on the size of files (`ulimit -f`) an error with words, where the system would end the
/// process without any.
pub fn outlive_file_limit() {
    #[cfg(unix)]
    {
        // Not installed, the process is as it would be anyway.
        let _ = signal_hook::flag::register(libc::SIGXFSZ, Arc::new(AtomicBool::new(false)));
    }
}

#[cfg(unix)]
mod system {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
    use signal_hook::low_level::{exit, signal_name};

    use super::Signals;
    use crate::console::talk;
    use polyhead_runs::Failure;

    /// `armed` is true from the first signal to leave on.
    pub fn wait(signals: Signals, armed: Arc<AtomicBool>, dashboard: bool) -> Result<(), Failure> {
        let mut waiting = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGUSR1, SIGUSR2])?;
        // Whoever starts a run under `nohup` means it to outlive the connection.
        if !is_ignored(SIGHUP) {
            waiting.add_signal(SIGHUP)?;
        }
        let answer = move || {
            for signal in waiting.forever() {
                let name = signal_name(signal).unwrap_or("signal");
                let tell = |what: &str| {
                    if !dashboard {
                        talk!("\n{name}: {what}");
                    }
                };
                let busy = signals.busy.load(Ordering::SeqCst);
                if signal == SIGUSR1 {
                    signals.requests.save.store(true, Ordering::SeqCst);
                    tell("saving after this step, then going on");
                } else if !busy || armed.swap(true, Ordering::SeqCst) {
                    if !busy {
                        tell("stopped; there is nothing that is not saved. The same command goes on from there");
                    }
                    exit(128 + signal);
                } else {
                    signals.requests.stop.store(signal as usize, Ordering::SeqCst);
                    tell("saving after this step, then leaving; once more leaves at once");
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(answer)?;
        Ok(())
    }

    fn is_ignored(signal: i32) -> bool {
        // SAFETY: sigaction is plain numbers, for which zeros are valid; with no new action the call only fills it.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let read = unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } == 0;
        read && action.sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
mod system {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::Signals;
    use polyhead_runs::Failure;

    /// Only Ctrl-C and its like, and always as if there were something to save.
    pub fn wait(signals: Signals, armed: Arc<AtomicBool>, _dashboard: bool) -> Result<(), Failure> {
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            let requests = signals.requests.clone();
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, armed.clone())?;
            signal_hook::flag::register(signal, armed.clone())?;
            let stop = move || requests.stop.store(signal as usize, std::sync::atomic::Ordering::SeqCst);
            // SAFETY: an atomic store is all that it does.
            unsafe { signal_hook::low_level::register(signal, stop) }?;
        }
        Ok(())
    }
}
