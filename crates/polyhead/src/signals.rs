//! Ctrl-C and its like: save, then leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use crate::report::Failure;

/// The number of the first SIGINT or SIGTERM; a second one ends the process at once.
///
/// # Errors
/// If a handler cannot be installed.
#[cfg_attr(not(feature = "tui"), allow(unused_variables))] // what the dashboard needs
pub fn listen(dashboard: bool) -> Result<Arc<AtomicUsize>, Failure> {
    let (stop, armed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    #[cfg(feature = "tui")]
    if dashboard {
        crate::dashboard::give_terminal_back(&armed)?;
    }
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, armed.clone())?;
        signal_hook::flag::register(signal, armed.clone())?;
        signal_hook::flag::register_usize(signal, stop.clone(), signal as usize)?;
    }
    Ok(stop)
}
