//! A pretrained model in Hugging Face's format: fine-tuned, loaded and run by Polyhead and by transformers, in alternating runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Measured, Outcome, median, polyhead, text, watched};

/// What is measured: its name, what is done, rows and tokens of each.
const TASKS: [(&str, Kind, [usize; 2]); 9] = [
    ("lora", Kind::Train { adapters: true, frugal: false }, [4, 128]),
    ("full", Kind::Train { adapters: false, frugal: false }, [4, 128]),
    ("full, least memory", Kind::Train { adapters: false, frugal: true }, [4, 128]),
    ("pretrain", Kind::Train { adapters: false, frugal: false }, [1, 1024]),
    ("pretrain, least memory", Kind::Train { adapters: false, frugal: true }, [1, 1024]),
    ("load", Kind::Load, [1, 16]),
    ("generate", Kind::Generate, [1, 16]),
    ("prefill", Kind::Prefill, [1, 16]),
    ("evaluate", Kind::Evaluate, [1, 512]),
];
/// New tokens of a generation.
const NEW: usize = 64;
/// Of LoRA.
const RANK: usize = 8;
const ALPHA: usize = 16;
const SENTENCE: &str = "What is written here does not matter, only that it is text. ";
/// Times that it stands in the long prompt.
const REPEATED: usize = 136;

/// What a process does.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Train {
        adapters: bool,
        /// In as little memory as either side knows: layers are run again for the backward pass, in which parameters are updated, without
        /// clipping.
        frugal: bool,
    },
    /// To the first token.
    Load,
    Generate,
    /// Reads a prompt.
    Prefill,
    /// The loss of a text, in windows.
    Evaluate,
}

/// Which program is measured.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Polyhead,
    Transformers,
    Compiled,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Polyhead => "Polyhead",
            Self::Transformers => "transformers",
            Self::Compiled => "torch.compile",
        }
    }
}

struct Bench<'a> {
    model: &'a Path,
    python: Option<&'a Path>,
    folder: &'a Path,
    steps: usize,
    threads: usize,
}

/// A folder with fresh weights in the shape of a published model.
pub fn shaped(shape: &str, python: Option<&Path>, folder: &Path) -> Outcome<PathBuf> {
    let (python, made) = (python.ok_or("--shape needs --python")?, folder.join(shape));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/shape.py");
    let output = Command::new(python).arg(script).arg(shape).arg(&made).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(made) } else { Err(format!("{}: {told}", python.display()).into()) }
}

/// A table of all tasks whose names contain `only`, with 1 and with 2 threads.
pub fn compare(model: &Path, python: Option<&Path>, folder: &Path, args: &super::Args) -> Outcome<String> {
    std::fs::write(folder.join("text.txt"), SENTENCE.repeat(4000))?;
    std::fs::write(folder.join("short.txt"), SENTENCE.repeat(400))?;
    std::fs::write(folder.join("prompt.txt"), SENTENCE.repeat(REPEATED))?;
    let super::Args { rounds, steps, .. } = *args;
    let mut table = format!(
        "{}: LoRA of rank {RANK} on q, k, v and o (lora: 4 rows of 128 tokens), all weights (full: 4 rows of 128; pretrain: \
         1 row of 1024), loading to the first token, {NEW} new tokens, a prompt of about 2000 tokens up to the first new one, the loss of a text in windows of \
         512. Medians of {rounds} alternating runs of {steps} steps.\n\n| task | threads | side | ms | against eager | peak MiB \
         | against eager | first loss |\n|---|---|---|---|---|---|---|---|\n",
        model.file_name().unwrap_or(model.as_os_str()).display()
    );
    for (task, kind, shape) in
        TASKS.into_iter().filter(|(task, ..)| args.only.as_ref().is_none_or(|only| task.contains(only)))
    {
        for threads in [1, 2] {
            let bench = Bench { model, python, folder, steps, threads };
            let spec = bench.specify(task, kind, shape)?;
            // Hooks of parameters are not for compiled models.
            let compiled = !args.no_compile && matches!(kind, Kind::Train { frugal: false, .. });
            let mut sides = vec![(Side::Polyhead, Measured::default())];
            if python.is_some() {
                sides.push((Side::Transformers, Measured::default()));
                sides.extend(compiled.then(|| (Side::Compiled, Measured::default())));
            }
            for round in 1..=rounds {
                for (side, measured) in &mut sides {
                    eprintln!("{task}, {threads} threads: round {round}, {} ...", side.name());
                    match side {
                        Side::Polyhead => bench.ours(kind, &spec, measured)?,
                        _ => bench.theirs(*side == Side::Compiled, measured)?,
                    }
                }
            }
            let rows = rows(task, threads, &sides);
            eprint!("{rows}");
            table += &rows;
        }
    }
    Ok(table)
}

fn rows(task: &str, threads: usize, sides: &[(Side, Measured)]) -> String {
    let seconds = |measured: &Measured| median(measured.seconds.clone());
    let eager = sides.iter().find(|(side, _)| *side == Side::Transformers).map(|(_, m)| (seconds(m), m.peak_bytes));
    let against = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}x"));
    let row = |(side, measured): &(Side, Measured)| {
        format!(
            "| {task} | {threads} | {} | {:.0} | {} | {:.0} | {} | {:.4} |\n",
            side.name(),
            1e3 * seconds(measured),
            against(eager.map(|(time, _)| time / seconds(measured))),
            measured.peak_bytes / 1048576.0,
            against(eager.map(|(_, bytes)| measured.peak_bytes / bytes)),
            measured.first_loss
        )
    };
    sides.iter().map(row).collect()
}

impl Bench<'_> {
    fn recipe(&self, kind: Kind, spec: &Value) -> String {
        let lora = match kind {
            Kind::Train { adapters: false, .. } => String::new(),
            _ => format!(
                "[lora]\nrank = {RANK}\nalpha = {ALPHA}\ntargets = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]\n"
            ),
        };
        let frugal = match kind {
            Kind::Train { frugal: true, .. } => {
                "optimizer_in_backward = true\nmax_norm = 0\nactivation_checkpointing = \"block\"\n"
            }
            _ => "",
        };
        format!(
            "[model]\npretrained = {:?}\n[data.text]\npaths = [{:?}]\n[training]\nsteps = {}\nseq_len = {}\nbatch_size = {}\n{frugal}{lora}\
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
    fn specify(&self, task: &str, kind: Kind, [batch, seq]: [usize; 2]) -> Outcome<Value> {
        let adapters = matches!(kind, Kind::Train { adapters: true, .. });
        let (trains, frugal) = (matches!(kind, Kind::Train { .. }), matches!(kind, Kind::Train { frugal: true, .. }));
        let mut spec = json!({
            "task": task, "trains": trains, "adapters": adapters, "frugal": frugal, "batch": batch, "seq": seq, "steps": self.steps, "threads": self.threads,
            "new": NEW, "rank": RANK, "alpha": ALPHA, "targets_of_lora": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "text": text(&self.folder.join("short.txt")), "prompt": text(&self.folder.join("prompt.txt")),
        });
        let recipe = self.folder.join("recipe.toml");
        std::fs::write(&recipe, self.recipe(kind, &spec))?;
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

    fn ours(&self, kind: Kind, spec: &Value, measured: &mut Measured) -> Outcome<()> {
        let run = self.folder.join("run");
        let _ = std::fs::remove_dir_all(&run);
        let (recipe, new, prompt) = (self.folder.join("recipe.toml"), NEW.to_string(), SENTENCE.repeat(REPEATED));
        let tokens = spec["tokens"].as_array().map_or(0, Vec::len) as f64;
        let greedy = |prompt, tokens| {
            let model = text(self.model);
            vec!["generate", model, "--prompt", prompt, "--temperature", "0", "--max-new-tokens", tokens]
        };
        const SHORT: &str = "Once upon a time";
        let (short, window) = (self.folder.join("short.txt"), spec["seq"].to_string());
        let args = match kind {
            Kind::Train { .. } => vec!["train", text(&recipe), "--out", text(&run)],
            Kind::Prefill => greedy(&prompt, "1"),
            Kind::Load => greedy(SHORT, "1"),
            Kind::Generate => greedy(SHORT, &new),
            Kind::Evaluate => {
                vec!["eval", text(self.model), "--text-file", text(&short), "--window", &window, "--stride", &window]
            }
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
        match kind {
            Kind::Train { .. } => {
                let log = std::fs::read_to_string(run.join("metrics.jsonl"))?;
                let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
                let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
                let number = |line: &Value, key: &str| line[key].as_f64().unwrap_or(f64::NAN);
                let seconds: Vec<f64> = steps.iter().map(|line| tokens / number(line, "tokens_per_second")).collect();
                measured.add(&seconds, steps.first().map_or(f64::NAN, |line| number(line, "loss")), peak);
            }
            Kind::Generate => {
                let rate =
                    told.lines().find_map(|line| line.strip_prefix(&format!("{NEW} tokens, "))?.split(' ').next());
                let rate: f64 = rate.ok_or_else(|| told.clone())?.parse()?;
                measured.add(&[NEW as f64 / rate], f64::NAN, peak);
            }
            Kind::Evaluate => {
                let told: Value = serde_json::from_slice(&output.stdout)?;
                measured.add(&[wall], told["loss"].as_f64().unwrap_or(f64::NAN), peak);
            }
            Kind::Prefill => {
                let seconds = told.lines().find_map(|line| line.rsplit_once("read in ")?.1.strip_suffix(" s"));
                measured.add(&[seconds.ok_or_else(|| told.clone())?.parse()?], f64::NAN, peak);
            }
            Kind::Load => measured.add(&[wall], f64::NAN, peak),
        }
        Ok(())
    }

    fn theirs(&self, compiled: bool, measured: &mut Measured) -> Outcome<()> {
        let python = self.python.ok_or("no Python")?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/pretrained.py");
        let mut command = Command::new(python);
        command.arg(script).arg(self.model).arg(self.folder.join("work.json"));
        command.args(compiled.then_some("--compile"));
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
