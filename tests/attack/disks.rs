//! Full disks and failing system calls: told, nothing saved is lost, and the run goes on bit for bit once there is room.

use std::path::Path;
use std::process::Command;

use crate::case::{Answer, Case, Held, How, Tried, ensure};
use crate::runs::Whole;
use crate::{Kind, kills, runs};

const STEPS: u64 = 8;
const TRAIN: [&str; 4] = ["train", "recipe.toml", "--out", "disk/run"];
/// Calls and how they may fail.
const FAULTS: [(&str, &[&str]); 11] = [
    ("write", &["ENOSPC", "EIO", "EDQUOT", "EINTR"]),
    ("fsync", &["EIO", "ENOSPC"]),
    ("fdatasync", &["EIO", "ENOSPC"]),
    ("rename", &["EIO", "ENOSPC", "EACCES"]),
    ("openat", &["EMFILE", "EACCES", "EIO", "ENOSPC"]),
    ("read", &["EIO", "EINTR"]),
    ("mkdir", &["ENOSPC", "EACCES"]),
    ("ftruncate", &["EIO", "ENOSPC"]),
    ("unlink,unlinkat,rmdir", &["EIO", "EACCES", "EBUSY"]),
    ("flock", &["EIO", "ENOLCK"]),
    ("getdents64", &["EIO"]),
];

/// A file system of a few hundred kilobytes, a limit on the length of files, and errors put in by strace.
#[derive(Default)]
pub struct Disks {
    wholes: Vec<Whole>,
    mounts: bool,
    strace: bool,
}

impl Kind for Disks {
    fn name(&self) -> &'static str {
        "disks"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        for recipe in runs::with_stages(STEPS) {
            self.wholes.push(Whole::train(case, recipe, &How::default(), &TRAIN)?);
        }
        self.strace = kills::can_trace();
        let disk = case.dir.join("disk");
        std::fs::create_dir(&disk)?;
        self.mounts = Mounted::new(&disk, 64)?.is_some();
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let whole = &self.wholes[case.random.below(self.wholes.len())];
        runs::lay_out(case, &whole.recipe)?;
        let disk = case.dir.join("disk");
        std::fs::create_dir(&disk)?;
        match case.random.below(4) {
            0 => {
                let blocks = 24 + case.random.below(300) as u64;
                let how = How { file_blocks: Some(blocks), ..How::default() };
                case.run_as(&how, &TRAIN)?.ends(&[0, 1])?;
                goes_on(case, whole, &format!("files of at most {} bytes", blocks * 512))
            }
            1 if !self.mounts => Ok(Tried::Skipped("no file system can be mounted here".into())),
            1 => {
                let size = 40 + case.random.below(800);
                let Some(mounted) = Mounted::new(&disk, size)? else {
                    return Ok(Tried::Skipped("no file system can be mounted here".into()));
                };
                case.note(&format!("disk is a file system of {size} KiB"));
                case.run(&[0, 1], &TRAIN)?;
                mounted.enlarge()?;
                goes_on(case, whole, &format!("a disk of {size} KiB"))
            }
            _ if !self.strace => Ok(Tried::Skipped("strace is not here, or may not trace".into())),
            _ => faults(case, whole),
        }
    }
}

/// A call fails, once or from then on, in a run from its beginning or in one that goes on.
fn faults(case: &mut Case, whole: &Whole) -> Held<Tried> {
    let (calls, errors) = *case.random.pick(&FAULTS);
    let error = *case.random.pick(errors);
    if case.random.one_in(2) {
        let mut first = case.start(&How::default(), &TRAIN)?;
        while first.runs()? && !runs::holds_checkpoint(&case.dir.join("disk/run")).unwrap_or(false) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        first.signal("TERM")?;
        first.wait()?.ends(&[0, 143])?;
    }
    let steps = runs::checkpoints(&case.dir.join("disk/run")).unwrap_or_default();
    let when = 1 + case.random.below(80);
    let more = if error != "EINTR" && case.random.one_in(2) { "+" } else { "" };
    let inject = format!("inject={calls}:error={error}:when={when}{more}");
    let answer = case.run_as(&How { through: kills::trace(calls, &inject), ..How::default() }, &TRAIN)?;
    let Answer { code, signal, timed_out, err, .. } = &answer;
    if calls == "read" && err.contains("std/src/sys/process") {
        // `gemm` asks `lscpu` for the sizes of caches, and the standard library panics where a pipe cannot be read.
        return Ok(Tried::Skipped("the read that failed was that of a pipe, which happens nowhere".into()));
    }
    // A message that could not be written is none that was left out; 127: the process could not even be loaded.
    let ended = matches!(code, Some(0 | 1 | 2 | 127)) && signal.is_none() && !timed_out && !err.contains("panicked at");
    ensure!(ended, "{inject}: code {code:?}, signal {signal:?}: {err}");
    let told = *code == Some(0) || *code == Some(127) || calls == "write" || err.contains("error");
    ensure!(told, "{inject}: no error is told: {err}");
    let now = runs::checkpoints(&case.dir.join("disk/run")).unwrap_or_default();
    ensure!(now.last() >= steps.last(), "{inject}: there was {steps:?}, now there is {now:?}: {err}");
    goes_on(case, whole, &inject)
}

/// With nothing in the way, the run ends as if nothing had been.
fn goes_on(case: &mut Case, whole: &Whole, after: &str) -> Held<Tried> {
    case.run(&[0], &TRAIN)?;
    whole.equals(&case.dir.join("disk/run"), &format!("after {after}"))?;
    Ok(Tried::Held)
}

/// A small file system in memory, for as long as it is held.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    /// `None` where this is not allowed.
    fn new(at: &'a Path, kib: usize) -> Held<Option<Self>> {
        let size = format!("size={kib}k");
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(at).output();
        Ok(output.is_ok_and(|output| output.status.success()).then_some(Self(at)))
    }

    fn enlarge(&self) -> Held {
        let status = Command::new("mount").args(["-o", "remount,size=64m"]).arg(self.0).status()?;
        ensure!(status.success(), "the attack itself: {} cannot be enlarged", self.0.display());
        Ok(())
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // What stays mounted keeps the folder; the system tidies up at its end.
        let _ = Command::new("umount").arg(self.0).status();
    }
}
