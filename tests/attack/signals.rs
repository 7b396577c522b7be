//! Signals at any moment, validation included: saved and left with the signal's number, and the run goes on bit for bit.

use crate::case::{Case, Held, How, Tried, ensure};
use crate::runs::Whole;
use crate::{Kind, runs};

const STEPS: u64 = 10;
const TRAIN: [&str; 4] = ["train", "recipe.toml", "--out", "run"];
/// Names and numbers; whether a run promises to save first.
const SIGNALS: [(&str, i32, bool); 4] = [("INT", 2, true), ("TERM", 15, true), ("HUP", 1, false), ("USR1", 10, false)];

/// SIGINT, SIGTERM, SIGHUP and SIGUSR1.
#[derive(Default)]
pub struct Signals {
    wholes: Vec<Whole>,
}

impl Kind for Signals {
    fn name(&self) -> &'static str {
        "signals"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        for (number, (name, recipe)) in runs::with_stages(STEPS).into_iter().enumerate() {
            // In every other run most of the time is spent in validation.
            let recipe = match number % 2 {
                0 => recipe.replace("interval = 4\nbatches = 2", "interval = 1\nbatches = 12"),
                _ => recipe,
            };
            self.wholes.push(Whole::train(case, (name, recipe), &How::default(), &TRAIN)?);
        }
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let whole = &self.wholes[case.random.below(self.wholes.len())];
        runs::lay_out(case, &whole.recipe)?;
        for _ in 0..1 + case.random.below(3) {
            let (name, number, saves) = *case.random.pick(&SIGNALS);
            let mut running = case.start(&How::default(), &TRAIN)?;
            let pause = whole.duration.mul_f64(case.random.share() * 1.1);
            std::thread::sleep(pause);
            let sent = running.signal(name)?;
            let twice = case.random.one_in(4) && running.signal(name)?;
            case.note(&format!("SIG{name} after {pause:?}, {}", if twice { "twice" } else { "once" }));
            let answer = running.wait()?;
            let told = format!("SIG{name}: code {:?}, signal {:?}: {}", answer.code, answer.signal, answer.err);
            ensure!(!answer.timed_out && !told.contains("panicked at"), "{told}");
            let left = answer.code == Some(128 + number);
            // Before anybody listens a signal ends the process as it always does.
            let died = answer.signal == Some(number) && (!saves || !answer.err.contains("step: "));
            ensure!(answer.code == Some(0) || sent && (left || died), "{told}");
            if left && !twice && saves {
                ensure!(["saved", "interrupted"].iter().any(|word| answer.err.contains(word)), "{told}");
                // While the data is opened there is nothing to save yet, and that is told.
                let nothing_yet = answer.err.contains("nothing that is not saved");
                ensure!(nothing_yet || runs::holds_checkpoint(&case.dir.join("run"))?, "nothing is saved: {told}");
            }
        }
        case.run(&[0], &TRAIN)?;
        whole.equals(&case.dir.join("run"), "after signals")?;
        Ok(Tried::Held)
    }
}
