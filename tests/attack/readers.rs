//! Readers while a run writes and prunes: each gets a whole answer, or an error that says what is wrong.

use serde_json::Value;

use crate::case::{Case, Held, How, Tried, ensure};
use crate::{Kind, runs};

/// Long enough for many readers.
const STEPS: u64 = 400;

/// Commands about a run, beside the training that writes it.
#[derive(Default)]
pub struct Readers;

impl Kind for Readers {
    fn name(&self) -> &'static str {
        "readers"
    }

    fn prepare(&mut self, _: &mut Case) -> Held {
        Ok(())
    }

    fn attack(&mut self, case: &mut Case) -> Held<Tried> {
        let recipes = runs::recipes(STEPS);
        let (name, recipe) = case.random.pick(&recipes).clone();
        case.write("book.txt", runs::book())?;
        case.write("recipe.toml", recipe)?;
        let every_step = ["checkpoint.interval=1", "checkpoint.keep_latest_k=1", "validation.interval=3"];
        let train = [&["train", "recipe.toml", "--out", "run"][..], &every_step].concat();
        let mut training = case.start(&How { seconds: 300, ..How::default() }, &train)?;
        while training.runs()? && !case.dir.join("run/best.json").exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let (mut asked, mut answered) = (0, 0);
        while asked < 20 && training.runs()? {
            answered += u64::from(read(case, name != "classifier")?);
            asked += 1;
        }
        // Errors are for what was pruned between two looks; where nothing is answered, something else is wrong.
        ensure!(asked < 10 || answered * 2 > asked, "only {answered} of {asked} questions were answered");
        training.signal("INT")?;
        training.wait()?.ends(&[0, 130])?;
        Ok(Tried::Held)
    }
}

/// Asks one thing. Gives whether it was answered.
fn read(case: &mut Case, is_decoder: bool) -> Held<bool> {
    let all: [(&[&str], bool); 8] = [
        (&["eval", "run", "--batches", "1"], false),
        (&["generate", "run", "--prompt", "The ", "--max-new-tokens", "3"], true),
        (&["logits", "run", "--tokens", "1,2", "--out", "logits.safetensors"], true),
        (&["inspect", "run", "--rows", "1"], true),
        (&["diff", "run", "run"], false),
        (&["cat", "run/recipe.toml"], false),
        (&["ls"], false),
        (&["export", "run", "--to", "exported"], true),
    ];
    let (args, for_decoders) = *case.random.pick(&all);
    if for_decoders && !is_decoder {
        return Ok(true);
    }
    let answer = case.run(&[0, 1, 2], args)?;
    let _ = std::fs::remove_dir_all(case.dir.join("exported"));
    if answer.code != Some(0) {
        return Ok(args[0] == "diff" || args[0] == "export");
    }
    match args[0] {
        "eval" => {
            let told: Value = serde_json::from_str(&answer.out)?;
            ensure!(told.to_string().contains("loss"), "no whole answer: {}", answer.out);
        }
        "generate" => ensure!(answer.out.starts_with("The "), "no whole answer: {}", answer.out),
        "cat" => ensure!(answer.out.contains("steps = 400"), "no whole answer: {}", answer.out),
        _ => {}
    }
    Ok(true)
}
