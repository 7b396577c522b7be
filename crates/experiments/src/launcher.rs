//! What starts child processes elsewhere: a command that is put before that of each, such as `srun --ntasks=1`.

use std::path::{Path, PathBuf};
use std::process::Command;

use polyhead_runs::text::quoted;

/// Launchers by name. One process gets a task of its own; mpirun would bind every one of them to the first core.
const NAMED: [(&str, &str); 2] = [("slurm", "srun --ntasks=1 --exclusive"), ("mpirun", "mpirun -n 1 --bind-to none")];

/// How many seconds Open MPI's mpirun (up to version 4, and from 5 on) lets a run save before it passes SIGTERM on, and again before it kills it.
/// Its own second is too short; chosen by us.
const PATIENCE: [(&str, &str); 2] =
    [("OMPI_MCA_odls_base_sigkill_timeout", "10"), ("PRTE_MCA_odls_base_sigkill_timeout", "10")];

/// A command that starts another once, somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launcher {
    /// As it was given.
    typed: String,
    program: String,
    arguments: Vec<String>,
}

impl Launcher {
    /// "slurm", "mpirun", or the words of a command, quoted as in a shell.
    ///
    /// # Errors
    /// If there is no such program here, or a quote is not closed.
    pub fn parse(typed: &str) -> Result<Self, String> {
        let typed = typed.trim();
        let command = NAMED.into_iter().find(|(name, _)| *name == typed).map_or(typed, |(_, command)| command);
        let words = shlex::split(command).ok_or_else(|| "a quote is not closed".to_owned())?;
        let mut words = words.into_iter();
        let Some(program) = words.next() else {
            return Err("it is empty: give slurm, mpirun, or the command that starts a run".into());
        };
        if !is_there(&program) {
            return Err(format!(
                "there is no program `{program}` here: start this where the launcher is (on a cluster as a rule a login node, or within \
                 an allocation), or give its path; by name there are slurm and mpirun"
            ));
        }
        Ok(Self { typed: typed.into(), program, arguments: words.collect() })
    }

    /// `program`, to be started by this.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg(program);
        command.envs(PATIENCE.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()));
        command
    }

    /// The command, as it is typed into a shell.
    pub fn words(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.arguments).map(|word| quoted(word));
        words.collect::<Vec<_>>().join(" ")
    }

    /// The flag that asks for it.
    pub fn flag(&self) -> String {
        format!("--launcher {}", quoted(&self.typed))
    }
}

/// Whether a program of this name or path can be started.
fn is_there(program: &str) -> bool {
    if Path::new(program).components().count() > 1 {
        return is_program(Path::new(program));
    }
    let folders: Vec<PathBuf> =
        std::env::var_os("PATH").map_or(Vec::new(), |path| std::env::split_paths(&path).collect());
    folders.iter().any(|folder| is_program(&folder.join(program)))
}

#[cfg(unix)]
fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_program(path: &Path) -> bool {
    path.is_file() || path.with_extension("exe").is_file()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    #[cfg(unix)]
    fn words_are_those_of_a_shell_and_come_before_the_command() {
        let launcher = Launcher::parse(" env -u 'A B' --chdir=\"a b\" ").unwrap();
        let command = launcher.command(Path::new("/bin/polyhead"));
        let words: Vec<&str> = command.get_args().map(|word| word.to_str().unwrap()).collect();
        assert_eq!(
            (command.get_program(), &words[..]),
            ("env".as_ref(), &["-u", "A B", "--chdir=a b", "/bin/polyhead"][..])
        );
        assert_eq!(launcher.words(), "env -u 'A B' '--chdir=a b'");
        assert_eq!(launcher.flag(), "--launcher 'env -u '\\''A B'\\'' --chdir=\"a b\"'");
        assert!(command.get_envs().any(|(name, _)| name == "PRTE_MCA_odls_base_sigkill_timeout"));
    }

    #[test]
    fn what_cannot_start_anything_is_refused() {
        for (typed, words) in [
            ("  ", "it is empty"),
            ("env 'a", "a quote is not closed"),
            ("srunn-of-nobody -n 1", "no program `srunn-of-nobody`"),
            ("./srunn -n 1", "no program `./srunn`"),
            ("/", "no program `/`"),
        ] {
            let told = Launcher::parse(typed).unwrap_err();
            assert!(told.contains(words), "{typed}: {told}");
        }
    }
}
