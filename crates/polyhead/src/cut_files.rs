//! A file that was cut while it is mapped into memory: the system then ends the process without a word, where the length was
//! not looked at between the cut and the reading. Here are the words.

/// From now on the process names the file and ends with exit code 1.
#[cfg(unix)]
pub fn name_them() {
    handler::install();
}

/// Elsewhere the system does not let anybody cut a file that is mapped.
#[cfg(not(unix))]
pub fn name_them() {}

#[cfg(unix)]
mod handler {
    use std::sync::OnceLock;

    use polyhead_models::mapped_file_at;

    /// What would have been done without us: for faults that are none of a mapped file.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    pub fn install() {
        // SAFETY: a `sigaction` of zeros is one without flags. Both calls get pointers to our own, and the handler has the
        // form that SA_SIGINFO asks for; it does only what a handler may do at any moment (see there). It runs on the stack
        // for signals that Rust gives each thread.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before);
            let _ = BEFORE.set(before);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fault as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
        }
    }

    /// Reads atomic numbers and makes system calls: no lock, no memory, nothing else of this process.
    extern "C" fn on_fault(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the system hands a handler of this form the facts about the fault.
        let address = unsafe { (*info).si_addr() } as usize;
        let Some(file) = mapped_file_at(address) else {
            if let Some(before) = BEFORE.get() {
                // SAFETY: an action that the system gave us. What faulted is run again, and meets it.
                unsafe { libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) };
            }
            return;
        };
        for part in [
            "\nerror: ",
            file,
            ": it became shorter while it was in use (or its disk has failed). Files that are in use may be replaced (write \
             another, then rename it), not cut\n  hint: the same command goes on from the last checkpoint\n",
        ] {
            // SAFETY: the bytes of a text.
            unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
        }
        // SAFETY: it ends the process, without running anything of it.
        unsafe { libc::_exit(1) };
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::process::{Command, Stdio};

    use polyhead_models::MappedFile;

    const CUT: &str = "POLYHEAD_TEST_CUT_FILE";

    /// Started by the test below, as a process of its own, which ends in the handler.
    #[test]
    fn a_cut_file_is_named() {
        if let Some(path) = std::env::var_os(CUT) {
            super::name_them();
            let mapped = MappedFile::open(path.as_ref()).expect("a file");
            let bytes = mapped.all().expect("not cut yet");
            std::fs::File::options().write(true).open(path).and_then(|file| file.set_len(0)).expect("cut");
            let sum: u64 = bytes.iter().map(|&byte| u64::from(byte)).sum();
            panic!("read {sum} from a file that is not there");
        }
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("cut.tokens");
        std::fs::write(&path, [7; 10_000]).expect("written");
        let output = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "cut_files::tests::a_cut_file_is_named", "--nocapture"])
            .env(CUT, &path)
            .stdin(Stdio::null())
            .output()
            .expect("started");
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("cut.tokens: it became shorter while it was in use"), "{told}");
    }
}
