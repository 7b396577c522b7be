//! `polyhead eval --task`: how far back a model finds what it is asked for.

use polyhead_data::chat::{Learn, chat_template};
use polyhead_data::long_context::{EIGHT, LongTask, Problems, generator};
use polyhead_evaluation::answers::{DEPTHS, Row, heatmap, is_right, line};
use polyhead_models::Batch;
use polyhead_runs::intervention::Rows;
use polyhead_runs::{Failure, open_trained};
use polyhead_training::run_folder::atomic_write;
use serde_json::json;

use crate::allowed::caller;
use crate::cli::EvalArgs;
use crate::console::{progress, put, talk};

/// Lengths of the texts where none are given, in units.
const LENGTHS: [usize; 4] = [1, 2, 4, 8];

/// Asks a model the questions of every task at every length and depth. An answer is right if the model, choosing the
/// likeliest token each time, would write it from the first token to the last.
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
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
    // In the order in which they are asked: task, length, depth, number.
    let asked: Vec<(LongTask, usize, usize, usize)> = (tasks.iter())
        .flat_map(|&task| lengths.iter().map(move |&times| (task, times)))
        .flat_map(|(task, times)| (0..depths_of(task)).map(move |depth| (task, times, depth)))
        .flat_map(|(task, times, depth)| (0..args.samples).map(move |sample| (task, times, depth, sample)))
        .collect();
    let make = |(task, times, depth, sample): (LongTask, usize, usize, usize)| {
        // Streams of training are those of the recipe's seed: another one keeps problems apart.
        let mut rng = generator(!args.seed, (sample * DEPTHS + depth) as u64);
        let middle = (depth as f64 + 0.5) / depths_of(task) as f64;
        problems.make(task, times * trained_on, middle, &mut rng)
    };
    let prompt = |at: u64| {
        let problem = make(asked[at as usize])?;
        Ok(Batch::text([begin, &problem.tokens.tokens[..problem.answer.start]].concat()))
    };
    let prompts = Rows { called: "problems", batches: asked.len() as u64, batch: &prompt, generates: true };
    trained.check_rows(&prompts)?.iter().for_each(|note| talk!("note: {note}"));
    let (mut rows, mut done): (Vec<Row>, _) = (Vec::new(), 0);
    for of_depth in asked.chunks(args.samples.max(1)) {
        let (task, times, depth, _) = of_depth[0];
        let mut right = 0;
        for &one in of_depth {
            let problem = make(one)?;
            right += usize::from(is_right(&trained.model, &problem.tokens.tokens, &problem.answer, begin));
            done += 1;
            progress("asking", done, asked.len() as u64);
        }
        if depth == 0 {
            let length = times * trained_on;
            rows.push(Row { task: task.name(), has_depth: task.has_depth(), length, times, by_depth: Vec::new() });
        }
        let Some(row) = rows.last_mut() else { continue };
        row.by_depth.push(right as f64 / args.samples as f64);
        if row.by_depth.len() == depths_of(task) {
            talk!("{}", line(row));
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
