//! `polyhead eval --task`: how far back a model finds what it is asked for.

use std::fmt::Write;

use polyhead_data::chat::{Learn, chat_template};
use polyhead_data::long_context::{EIGHT, LongProblem, LongTask, Problems, generator};
use polyhead_models::{Batch, Decoder, IGNORE};
use polyhead_training::run_folder::atomic_write;
use serde_json::json;

use super::trained::text_tokenizer;
use crate::assemble;
use crate::cli::EvalArgs;
use crate::console::{put, talk};
use crate::report::Failure;

/// Parts into which texts are divided by depth.
const DEPTHS: usize = 5;

/// Lengths of the texts where none are given, in units.
const LENGTHS: [usize; 4] = [1, 2, 4, 8];

/// Accuracies of a task at a length.
struct Row {
    task: LongTask,
    /// Tokens.
    length: usize,
    /// Length in lengths of training.
    times: usize,
    /// Share of right answers by depth; one number where there is no depth.
    by_depth: Vec<f64>,
}

impl Row {
    fn accuracy(&self) -> f64 {
        self.by_depth.iter().sum::<f64>() / self.by_depth.len() as f64
    }
}

/// Asks a model the questions of every task at every length and depth. An answer is right if the model, choosing the
/// likeliest token each time, would write it from the first token to the last.
pub fn eval(args: &EvalArgs) -> Result<(), Failure> {
    let trained = assemble::open_trained(&args.checkpoint, args.device.as_deref())?;
    let tokenizer = text_tokenizer(trained.tokenizer.as_ref(), &trained.path)?;
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
    let longest = lengths.iter().max().copied().unwrap_or(1).saturating_mul(trained_on);
    trained.check_length(longest, "the longest text (--lengths times --unit)")?;
    talk!("{} problems each, by length (1x = {trained_on} tokens) and depth", args.samples);
    let mut rows = Vec::new();
    for task in tasks {
        for &times in lengths {
            let length = times * trained_on;
            let depths = if task.has_depth() { DEPTHS } else { 1 };
            let mut by_depth = Vec::new();
            for depth in 0..depths {
                let mut right = 0;
                for sample in 0..args.samples {
                    let stream = (sample * DEPTHS + depth) as u64;
                    // Streams of training are those of the recipe's seed: another one keeps problems apart.
                    let mut rng = generator(!args.seed, stream);
                    let middle = (depth as f64 + 0.5) / depths as f64;
                    let problem = problems.make(task, length, middle, &mut rng)?;
                    right += usize::from(is_right(&trained.model, &problem, begin));
                }
                by_depth.push(right as f64 / args.samples as f64);
            }
            let row = Row { task, length, times, by_depth };
            talk!("{}", line(&row));
            rows.push(row);
        }
    }
    if let Some(path) = &args.heatmap {
        atomic_write(path, heatmap(&rows).as_bytes())?;
        talk!("picture: {}", path.display());
    }
    let results: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({ "task": row.task.name(), "length": row.length, "times": row.times, "accuracy": row.accuracy(),
                "accuracy_by_depth": row.by_depth })
        })
        .collect();
    let result = json!({ "checkpoint": trained.path, "samples_per_depth": args.samples, "seed": args.seed,
        "unit": trained_on, "results": results });
    put!("{result:#}")
}

/// Whether the model answers a problem, behind the tokens that begin a text.
fn is_right(model: &Decoder, problem: &LongProblem, begin: &[u32]) -> bool {
    let tokens = [begin, &problem.tokens.tokens[..problem.answer.end]].concat();
    let asked = |at: usize| (at + 1).checked_sub(begin.len()).is_some_and(|at| problem.answer.contains(&at));
    let target = |at: usize| if asked(at) { i64::from(tokens[at + 1]) } else { IGNORE };
    let seq = tokens.len();
    let targets = (0..seq).map(target).collect();
    let batch = Batch { batch: 1, seq, tokens, targets, ..Batch::default() };
    let sums = model.evaluate(&batch);
    sums.targets > 0 && sums.correct == sums.targets
}

fn line(row: &Row) -> String {
    let mut text = format!("{:<18} {:>3}x {:>7} tokens ", row.task.name(), row.times, row.length);
    for accuracy in &row.by_depth {
        let _ = write!(text, " {:>4.0} %", 100.0 * accuracy);
    }
    if row.task.has_depth() {
        let _ = write!(text, "   all {:>4.0} %", 100.0 * row.accuracy());
    }
    text
}

/// One panel a task: lengths from left to right, depths from top to bottom.
fn heatmap(rows: &[Row]) -> String {
    const CELL: usize = 52;
    const LEFT: usize = 70;
    const TOP: usize = 46;
    let mut tasks: Vec<LongTask> = rows.iter().map(|row| row.task).collect();
    tasks.dedup();
    let of = |task: LongTask| rows.iter().filter(move |row| row.task == task);
    let columns = tasks.iter().map(|&task| of(task).count()).max().unwrap_or(0);
    let (width, panel) = (LEFT + columns * CELL + 20, TOP + DEPTHS * 30 + 16);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        panel * tasks.len()
    );
    let mut text = |x: usize, y: usize, anchor: &str, colour: &str, words: String| {
        let _ = writeln!(svg, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{words}</text>");
    };
    let mut cells = String::new();
    for (number, &task) in tasks.iter().enumerate() {
        let top = number * panel;
        text(LEFT, top + 18, "start", "black", format!("{}: right answers in %", task.name()));
        for (column, row) in of(task).enumerate() {
            let x = LEFT + column * CELL;
            text(x + CELL / 2, top + 38, "middle", "black", format!("{}x", row.times));
            let height = DEPTHS * 30 / row.by_depth.len();
            for (depth, accuracy) in row.by_depth.iter().enumerate() {
                let y = top + TOP + depth * height;
                // From white to a dark blue.
                let shade = |white: f64, full: f64| (white + (full - white) * accuracy) as u8;
                let _ = writeln!(
                    cells,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"rgb({},{},{})\"/>",
                    CELL - 2,
                    height - 2,
                    shade(240.0, 20.0),
                    shade(240.0, 80.0),
                    shade(240.0, 150.0)
                );
                let colour = if *accuracy > 0.5 { "white" } else { "black" };
                let words = format!("{:.0}", 100.0 * accuracy);
                let middle = y + height / 2 + 4;
                let label = format!(
                    "<text x=\"{}\" y=\"{middle}\" text-anchor=\"middle\" fill=\"{colour}\">{words}</text>\n",
                    x + CELL / 2 - 1
                );
                cells.push_str(&label);
                if column == 0 && row.by_depth.len() > 1 {
                    let share = |depth: usize| 100 * depth / DEPTHS;
                    text(LEFT - 6, middle, "end", "black", format!("{}-{} %", share(depth), share(depth + 1)));
                }
            }
        }
    }
    svg + &cells + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_has_a_cell_for_every_number() {
        let row = |task, times, by_depth| Row { task, length: 10 * times, times, by_depth };
        let rows = [
            row(LongTask::NeedlesMulti, 1, vec![1.0, 0.5, 0.0, 0.25, 0.75]),
            row(LongTask::NeedlesMulti, 2, vec![0.0; 5]),
            row(LongTask::CommonWords, 1, vec![0.3]),
        ];
        let svg = heatmap(&rows);
        assert_eq!(svg.matches("<rect ").count(), 1 + 11);
        for words in [">needles_multi: ", ">common_words: ", ">20-40 %<", ">75<", ">2x<"] {
            assert!(svg.contains(words), "{words}");
        }
        assert!(line(&rows[0]).contains("100 %   50 %    0 %   25 %   75 %   all   50 %"), "{}", line(&rows[0]));
    }
}
