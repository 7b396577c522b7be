//! Kills at any moment, one after the other: the run that goes on to its end is the run that was never interrupted.

use crate::case::{Case, Held, How, Tried, ensure};
use crate::runs::Whole;
use crate::{Kind, runs};

const STEPS: u64 = 10;
const TRAIN: [&str; 4] = ["train", "recipe.toml", "--out", "run"];
/// What a process asks of the system around a save; strace kills it at one of these calls.
const CALLS: [&str; 9] =
    ["rename", "fsync", "fdatasync", "write", "openat", "unlink,unlinkat", "mkdir", "rmdir", "ftruncate"];

/// SIGKILL, at random times and, where strace is, at single system calls.
#[derive(Default)]
pub struct Kills {
    wholes: Vec<Whole>,
    strace: bool,
}

impl Kind for Kills {
    fn name(&self) -> &'static str {
        "kills"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        self.strace = can_trace();
        for recipe in runs::with_stages(STEPS) {
            self.wholes.push(Whole::train(case, recipe, &How::default(), &TRAIN)?);
        }
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let whole = &self.wholes[case.random.below(self.wholes.len())];
        runs::lay_out(case, &whole.recipe)?;
        let mut kills = 0;
        for _ in 0..1 + case.random.below(4) {
            let answer = if self.strace && case.random.one_in(2) {
                let (calls, when) = (*case.random.pick(&CALLS), 1 + case.random.below(60));
                let inject = format!("inject={calls}:signal=KILL:when={when}");
                case.run_as(&How { through: trace(calls, &inject), ..How::default() }, &TRAIN)?
            } else {
                let pause = whole.duration.mul_f64(case.random.share() * 1.1);
                let mut running = case.start(&How::default(), &TRAIN)?;
                std::thread::sleep(pause);
                running.signal("KILL")?;
                case.note(&format!("killed after {pause:?}"));
                running.wait()?
            };
            ensure!(!answer.err.contains("panicked at"), "panicked: {}", answer.err);
            ensure!(answer.signal == Some(9) || answer.code == Some(0), "{:?}: {}", answer.code, answer.err);
            kills += usize::from(answer.signal.is_some());
        }
        case.run(&[0], &TRAIN)?;
        whole.equals(&case.dir.join("run"), &format!("after {kills} kills"))?;
        Ok(Tried::Held)
    }
}

/// Whether strace is there and may trace.
pub fn can_trace() -> bool {
    let output = std::process::Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    output.is_ok_and(|output| output.status.success())
}

/// The command that runs another one and does something at its system calls.
pub fn trace(calls: &str, inject: &str) -> Vec<String> {
    let calls = format!("trace={calls}");
    ["strace", "-f", "-qq", "-o", "/dev/null", "-e", &calls, "-e", inject].map(Into::into).into()
}
