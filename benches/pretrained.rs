//! A pretrained model in Hugging Face's format: fine-tuned, loaded and run by Polyhead and by transformers, in alternating runs.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Measured, Outcome, median, polyhead, text, watched};

/// What is measured.
const TASKS: [&str; 6] = ["lora", "full", "long", "load", "generate", "prefill"];
/// New tokens of a generation.
const NEW: usize = 64;
/// Tokens of a long prompt.
const PROMPT: usize = 2048;
/// Of LoRA.
const RANK: usize = 8;
const ALPHA: usize = 16;

struct Bench<'a> {
    model: &'a Path,
    folder: &'a Path,
    steps: usize,
    threads: usize,
}

/// A table of all tasks whose names contain `only`, with 1 and with 2 threads.
pub fn compare(
    model: &Path,
    python: Option<&Path>,
    folder: &Path,
    (only, rounds, steps): (&str, usize, usize),
) -> Outcome<String> {
    std::fs::write(
        folder.join("text.txt"),
        "What is written here does not matter, only that it is text. ".repeat(2000),
    )?;
    let mut table = format!(
        "\n{}: LoRA of rank {RANK} on q, k, v and o (lora: 4 rows of 128 tokens, long: 1 row of 1024), all weights (full: 2 rows \
         of 192), loading to the first token, {NEW} new tokens, a prompt of {PROMPT} tokens. Medians of {rounds} alternating \
         runs of {steps} steps.\n\n| task | threads | Polyhead ms | transformers ms | against it | Polyhead MiB | transformers \
         MiB | first losses |\n|---|---|---|---|---|---|---|---|\n",
        model.display()
    );
    for task in TASKS.into_iter().filter(|task| task.contains(only)) {
        for threads in [1, 2] {
            let bench = Bench { model, folder, steps, threads };
            let spec = bench.specify(task)?;
            let mut sides = [Measured::default(), Measured::default()];
            for round in 1..=rounds {
                eprintln!("{task}, {threads} threads: round {round} ...");
                bench.ours(task, &spec, &mut sides[0])?;
                if let Some(python) = python {
                    bench.theirs(python, &mut sides[1])?;
                }
            }
            let [ours, theirs] = sides.each_ref().map(|side| 1e3 * median(side.seconds.clone()));
            let [our_peak, their_peak] = sides.each_ref().map(|side| side.peak_bytes / 1048576.0);
            let losses = [sides[0].first_loss, sides[1].first_loss];
            table += &format!(
                "| {task} | {threads} | {ours:.0} | {theirs:.0} | {:.2}x | {our_peak:.0} | {their_peak:.0} | {:.4} {:.4} |\n",
                theirs / ours,
                losses[0],
                losses[1]
            );
        }
    }
    Ok(table)
}

impl Bench<'_> {
    fn recipe(&self, task: &str, spec: &Value) -> String {
        let lora = match task {
            "full" => String::new(),
            _ => format!(
                "[lora]\nrank = {RANK}\nalpha = {ALPHA}\ntargets = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]\n"
            ),
        };
        format!(
            "[model]\npretrained = {:?}\n[data.text]\npaths = [{:?}]\n[training]\nsteps = {}\nseq_len = {}\nbatch_size = {}\n{lora}\
             [optimizer.adamw]\nlr = 0.0\n[validation]\nbatches = 1\n[checkpoint]\ninterval = 0\n\
             [metrics]\nlog_freq = 1\ntensorboard = false\nobserve = false\n",
            text(self.model),
            text(&self.folder.join("text.txt")),
            self.steps,
            spec["seq"],
            spec["batch"]
        )
    }

    /// Describes a task to both sides: `work.json`, and for training `recipe.toml`.
    fn specify(&self, task: &str) -> Outcome<Value> {
        let [batch, seq] = match task {
            "lora" => [4, 128],
            "full" => [2, 192],
            "prefill" => [1, PROMPT],
            "long" => [1, 1024],
            _ => [1, 16],
        };
        let mut spec = json!({
            "task": task, "batch": batch, "seq": seq, "steps": self.steps, "threads": self.threads, "new": NEW, "rank": RANK,
            "alpha": ALPHA, "targets_of_lora": ["q_proj", "k_proj", "v_proj", "o_proj"],
        });
        let recipe = self.folder.join("recipe.toml");
        std::fs::write(&recipe, self.recipe(task, &spec))?;
        let shown = polyhead(&["preview", text(&recipe), "--rows", &batch.to_string()])?;
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        // position, document, token, its text -> target, its text
        for (line, target) in shown.lines().filter_map(|line| line.rsplit_once(" -> ")) {
            let token = line.split_whitespace().nth(2).and_then(|id| id.parse::<i64>().ok());
            if let Some(token) = token {
                tokens.push(token);
                targets.push(target.split_whitespace().next().and_then(|id| id.parse::<i64>().ok()).unwrap_or(-100));
            }
        }
        assert_eq!(tokens.len(), batch * seq, "`preview` shows the whole batch");
        (spec["tokens"], spec["targets"]) = (json!(tokens), json!(targets));
        std::fs::write(self.folder.join("work.json"), spec.to_string())?;
        Ok(spec)
    }

    fn command(&self, args: &[&str]) -> Command {
        // GNU time tells the peak of a process that does not tell it itself.
        let mut command = Command::new("/usr/bin/time");
        command.args(["-f", "peak %M", env!("CARGO_BIN_EXE_polyhead")]).args(args);
        command.env("RAYON_NUM_THREADS", self.threads.to_string());
        command
    }

    fn ours(&self, task: &str, spec: &Value, measured: &mut Measured) -> Outcome<()> {
        let run = self.folder.join("run");
        let _ = std::fs::remove_dir_all(&run);
        let (recipe, logits, new) = (self.folder.join("recipe.toml"), self.folder.join("logits"), NEW.to_string());
        let ids: Vec<String> = spec["tokens"].as_array().into_iter().flatten().map(Value::to_string).collect();
        let ids = ids.join(",");
        let greedy =
            ["generate", text(self.model), "--prompt", "Once upon a time", "--temperature", "0", "--max-new-tokens"];
        let args = match task {
            "lora" | "full" | "long" => vec!["train", text(&recipe), "--out", text(&run)],
            "prefill" => vec!["logits", text(self.model), "--tokens", &ids, "--out", text(&logits)],
            "load" => [&greedy[..], &["1"]].concat(),
            _ => [&greedy[..], &[new.as_str()]].concat(),
        };
        let start = Instant::now();
        let (output, _) = watched(self.command(&args), false)?;
        let wall = start.elapsed().as_secs_f64();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(format!("polyhead {args:?}: {told}").into());
        }
        let peak =
            told.lines().rev().find_map(|line| line.strip_prefix("peak ")?.parse::<f64>().ok()).unwrap_or(f64::NAN);
        let peak = 1024.0 * peak;
        match task {
            "lora" | "full" | "long" => {
                let log = std::fs::read_to_string(run.join("metrics.jsonl"))?;
                let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
                let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
                let number = |line: &Value, key: &str| line[key].as_f64().unwrap_or(f64::NAN);
                let seconds: Vec<f64> = steps
                    .iter()
                    .map(|line| ids.split(',').count() as f64 / number(line, "tokens_per_second"))
                    .collect();
                measured.add(&seconds, steps.first().map_or(f64::NAN, |line| number(line, "loss")), peak);
            }
            "generate" => {
                let rate =
                    told.lines().find_map(|line| line.strip_prefix(&format!("{NEW} tokens, "))?.split(' ').next());
                let rate: f64 = rate.ok_or_else(|| told.clone())?.parse()?;
                measured.add(&[NEW as f64 / rate], f64::NAN, peak);
            }
            _ => measured.add(&[wall], f64::NAN, peak),
        }
        Ok(())
    }

    fn theirs(&self, python: &Path, measured: &mut Measured) -> Outcome<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/pretrained.py");
        let mut command = Command::new(python);
        command.arg(script).arg(self.model).arg(self.folder.join("work.json"));
        command.env("OMP_NUM_THREADS", self.threads.to_string());
        let output = command.output()?;
        let last = String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned();
        let result: Value = serde_json::from_str(&last)
            .map_err(|_| format!("{}: {}", python.display(), String::from_utf8_lossy(&output.stderr)))?;
        let seconds: Vec<f64> = result["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
        measured.add(&seconds, number("first_loss"), number("peak_bytes"));
        Ok(())
    }
}
