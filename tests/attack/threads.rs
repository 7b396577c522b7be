//! Numbers of threads give the same bits, and long runs take no more memory than short ones.

use serde_json::Value;

use crate::case::{Case, Held, How, Tried, ensure};
use crate::runs::Whole;
use crate::{Kind, runs};

const STEPS: u64 = 4;
/// What shows leaks of one buffer a step: steps of a long run, and how much more its end may hold than its first third, in bytes.
/// Buffers of the allocator settle within some hundred steps.
const LONG: u64 = 3000;
const GROWTH: f64 = 1.5 * 1024.0 * 1024.0;
/// Large enough that work is divided among threads.
const LARGER: [&str; 3] = ["training.seq_len=64", "training.batch_size=8", "model.decoder.d_model=32"];

/// 1 to 8 threads; thousands of steps.
#[derive(Default)]
pub struct Threads {
    /// On one thread.
    wholes: Vec<Whole>,
}

fn train(name: &str) -> Vec<&'static str> {
    let all = ["train", "recipe.toml", "--out", "run"];
    if name != "classifier" { [&all[..], &LARGER].concat() } else { all.to_vec() }
}

fn threads(number: usize) -> How {
    How { env: vec![("RAYON_NUM_THREADS", number.to_string())], seconds: 300, ..How::default() }
}

impl Kind for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn prepare(&mut self, case: &mut Case) -> Held {
        for recipe in runs::recipes(STEPS) {
            let train = train(recipe.0);
            self.wholes.push(Whole::train(case, recipe, &threads(1), &train)?);
        }
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let whole = &self.wholes[case.random.below(self.wholes.len())];
        runs::lay_out(case, &whole.recipe)?;
        if case.random.one_in(8) {
            return long(case);
        }
        let number = 2 + case.random.below(7);
        case.run_as(&threads(number), &train(whole.name))?.ends(&[0])?;
        whole.equals(&case.dir.join("run"), &format!("with {number} threads"))?;
        Ok(Tried::Held)
    }
}

/// A long run, by the memory that its log tells.
fn long(case: &mut Case) -> Held<Tried> {
    let steps = format!("training.steps={LONG}");
    let rare = ["metrics.log_freq=50", "validation.interval=250", "checkpoint.interval=250"];
    let all = [&["train", "recipe.toml", "--out", "run", &steps][..], &rare].concat();
    case.run_as(&How { seconds: 600, ..How::default() }, &all)?.ends(&[0])?;
    let log = std::fs::read_to_string(case.dir.join("run/metrics.jsonl"))?;
    let mut memory = Vec::new();
    for line in log.lines() {
        let line: Value = serde_json::from_str(line)?;
        memory.extend(line["memory"].as_f64());
    }
    let (Some(&first), Some(&last)) = (memory.get(memory.len() / 3), memory.last()) else {
        return Ok(Tried::Skipped("memory is not told on this system".into()));
    };
    ensure!(last - first < GROWTH, "memory grew from {first} bytes after a third of {LONG} steps to {last}");
    Ok(Tried::Held)
}
