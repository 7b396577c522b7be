//! `polyhead eval --task`: how far back a model finds what it is asked for.

use polyhead_data::chat::{Learn, chat_template};
use polyhead_data::long_context::{EIGHT, LongTask, Problems, generator};
use polyhead_evaluation::answers::{DEPTHS, Row, heatmap, is_right, line};
use polyhead_training::run_folder::atomic_write;
use serde_json::json;

use crate::allowed::caller;
use crate::cli::EvalArgs;
use crate::console::{progress, put, talk};
use polyhead_runs::Failure;
use polyhead_runs::open_trained;

/// Lengths of the texts where none are given, in units.
const LENGTHS: [usize; 4] = [1, 2, 4, 8];

/// Asks a model the questions of every task at every length and depth. An answer is right if the model, choosing the
/// likeliest token each time, would write it from the first token to the last.
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
    trained.check_roles(false)?;
    let tokenizer = trained.text_tokenizer()?;
    let name = if tokenizer.chat_template().is_some() { "tokenizer" } else { "plain" };
    let template = chat_template("chat template", name, tokenizer)?;
    // A chat template writes it itself.
    let begin = if name == "plain" { tokenizer.beginning() } else { &[] };
    let problems = Problems { tokenizer, template: &template, learn: Learn::Assistant, questions: 1, keys: EIGHT };
    let lengths = if args.lengths.is_empty() { &LENGTHS[..] } else { &args.lengths };
    let trained_on = args.unit.unwrap_or(trained.max_positions);
    let tasks: Vec<LongTask> = match args.task.iter().any(|name| name == "all") {
        true => LongTask::ALL.to_vec(),
        false => LongTask::ALL.into_iter().filter(|task| args.task.iter().any(|name| name == task.name())).collect(),
    };
    talk!("{} problems each, by length (1x = {trained_on} tokens) and depth", args.samples);
    let depths_of = |task: LongTask| if task.has_depth() { DEPTHS } else { 1 };
    let depths: usize = tasks.iter().map(|&task| depths_of(task)).sum();
    let (all, mut done) = ((depths * lengths.len() * args.samples) as u64, 0);
    let mut rows = Vec::new();
    for task in tasks {
        for &times in lengths {
            let length = times * trained_on;
            let depths = depths_of(task);
            let mut by_depth = Vec::new();
            for depth in 0..depths {
                let mut right = 0;
                for sample in 0..args.samples {
                    let stream = (sample * DEPTHS + depth) as u64;
                    // Streams of training are those of the recipe's seed: another one keeps problems apart.
                    let mut rng = generator(!args.seed, stream);
                    let middle = (depth as f64 + 0.5) / depths as f64;
                    let problem = problems.make(task, length, middle, &mut rng)?;
                    right += usize::from(is_right(&trained.model, &problem.tokens.tokens, &problem.answer, begin));
                    done += 1;
                    progress("asking", done, all);
                }
                by_depth.push(right as f64 / args.samples as f64);
            }
            let row = Row { task: task.name(), has_depth: task.has_depth(), length, times, by_depth };
            talk!("{}", line(&row));
            rows.push(row);
        }
    }
    if let Some(path) = &args.heatmap {
        atomic_write(path, heatmap(&rows).as_bytes())?;
        talk!("image: {}", path.display());
    }
    let results: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({ "task": row.task, "length": row.length, "times": row.times, "accuracy": row.accuracy(),
                "accuracy_by_depth": row.by_depth })
        })
        .collect();
    let result = json!({ "checkpoint": trained.path, "samples_per_depth": args.samples, "seed": args.seed,
        "unit": trained_on, "results": results });
    put!("{result:#}")
}
