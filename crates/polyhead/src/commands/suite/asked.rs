//! Suites that ask a trained model: it writes what is likeliest, and what it writes is scored.

use std::path::Path;
use std::time::Instant;

use polyhead_data::text_suites::{TextQuestions, TextTask, sentences};
use polyhead_experiments::suite_runs::result::{SuiteCell, SuiteResult, SuiteRow, mean_of_tasks};
use polyhead_experiments::suites::{Questions, Suite};
use polyhead_models::{Past, Sampling, parameters};
use polyhead_recipe::Problems;
use polyhead_runs::answer::{Prompt, answer};
use polyhead_runs::pretrained::Pretrained;
use polyhead_runs::result::{self, Environment};
use polyhead_runs::{Caller, Failure, Trained, open_trained};
use polyhead_training::run_folder::{RunLock, files::RESULT};
use serde_json::json;

use super::SuiteArgs;
use crate::allowed::caller;
use crate::console::{progress, put, talk, wants_json};

/// Asks a model everything that a suite asks, and writes what it reached; what was asked before is kept.
pub fn ask(suite: &Suite, questions: &Questions, args: &SuiteArgs) -> Result<(), Failure> {
    let refused = |problem: String| Err(Problems::plain(problem).into());
    if !args.overrides.is_empty() || args.record {
        return refused(format!(
            "{} asks a trained model as it is: KEY=VALUE and --record are for suites that train",
            suite.name
        ));
    }
    let lengths = if args.lengths.is_empty() { questions.lengths } else { &args.lengths };
    let rows = args.samples.map_or(questions.rows, |rows| rows as u64);
    let wanted = |task: &TextTask| args.only.iter().all(|words| task.name().contains(words.as_str()));
    let tasks: Vec<TextTask> = (questions.tasks)().into_iter().filter(wanted).collect();
    if tasks.is_empty() {
        let names: Vec<&str> = (questions.tasks)().into_iter().map(TextTask::name).collect();
        return refused(format!(
            "no task of {} has \"{}\" in its name: there are {}",
            suite.name,
            args.only.join(" "),
            names.join(", ")
        ));
    }
    if args.dry_run && wants_json() {
        let names: Vec<&str> = tasks.iter().map(|task| task.name()).collect();
        let asked = json!({ "suite": suite.name, "paper": suite.paper, "differs": suite.differs, "tasks": names, "lengths": lengths,
            "questions": rows });
        return put!("{asked:#}");
    }
    if args.dry_run {
        put!("{}: {}\n{}", suite.name, suite.about, suite.paper)?;
        suite.differs.iter().try_for_each(|words| put!("differs: {words}"))?;
        let names: Vec<&str> = tasks.iter().map(|task| task.name()).collect();
        return put!("\n{rows} questions each of {} at {lengths:?} tokens", names.join(", "));
    }
    let Some(path) = &args.model else {
        return refused(format!(
            "{} asks a trained model: name it with --model, a run folder or a checkpoint",
            suite.name
        ));
    };
    let trained = open_trained(path, args.device.as_deref(), caller())?;
    let sentences = match &args.background {
        None => Vec::new(),
        Some(file) => sentences(&std::fs::read_to_string(file).map_err(|error| Failure::file("read", file, error))?),
    };
    let seed = args.seed.unwrap_or(questions.seed);
    let maker = TextQuestions { tokenizer: trained.text_tokenizer()?.clone(), sentences, seed };
    let out = args.out.clone().unwrap_or_else(|| Path::new("checkpoints/suite").join(suite.name));
    let _lock = RunLock::acquire(&out)?;
    let file = out.join(RESULT);
    // The path alone would not tell that other weights are there now.
    let found = Pretrained::open(path, Caller { tell: |_| {}, ..caller() })?;
    let model = [format!("model = {}", trained.path.display()), format!("weights = {}", found.weights_hash()?)];
    let background = args.background.iter().map(|file| format!("background = {}", file.display()));
    let mut reached = SuiteResult {
        environment: Some(Environment::here(args.device.as_deref().unwrap_or("flex"))),
        ..SuiteResult::empty(suite, model.into_iter().chain(background).collect(), seed)
    };
    let before = if file.exists() { Some(SuiteResult::read(&file)?) } else { None };
    let before = before.filter(|before| before.changes == reached.changes).map_or(Vec::new(), |before| before.rows);
    for task in tasks {
        for &length in lengths {
            let first = maker.make(task, length, 0)?.prompt;
            let recipe = result::id(&format!("{} {length} {rows}", task.name()), None);
            let data = result::id(&first, None);
            let done = |row: &&SuiteRow| row.cells.iter().any(|cell| cell.recipe == recipe && cell.data == data);
            let row = match before.iter().find(done) {
                Some(row) => row.clone(),
                None => {
                    let started = Instant::now();
                    let score = score(&trained, &maker, (task, length, rows))?;
                    let parameters = parameters(&trained.model).iter().map(|one| one.elements() as u64).sum();
                    let (cell, sets, seconds) = (String::new(), Vec::new(), started.elapsed().as_secs_f64());
                    row(task, length, SuiteCell { cell, recipe, data, score, sets, steps: 0, parameters, seconds })
                }
            };
            talk!("{:<18} {length:>7} tokens  {:>5.1} %", task.name(), 100.0 * row.score.unwrap_or_default());
            reached.rows.push(row);
            reached.mean = mean_of_tasks(&reached.rows);
            reached.write(&file)?;
        }
    }
    reached.publish(&out)?;
    talk!("\nresult   {}", file.display());
    super::print_result(&reached)
}

/// What a task was answered at a length.
fn row(task: TextTask, length: usize, cell: SuiteCell) -> SuiteRow {
    SuiteRow {
        task: task.name().into(),
        setting: format!("{length} tokens"),
        size: String::new(),
        measure: task.measure().into(),
        score: Some(cell.score),
        best: Some(String::new()),
        cells: vec![cell],
        failed: Vec::new(),
    }
}

/// The mean score of what a model writes to the questions of a task at a length.
fn score(
    trained: &Trained,
    maker: &TextQuestions,
    (task, length, rows): (TextTask, usize, u64),
) -> Result<f64, Failure> {
    let tokenizer = trained.text_tokenizer()?;
    let mut sum = 0.0;
    for index in 0..rows {
        progress("asking", index, rows);
        let question = maker.make(task, length, index)?;
        let prompt = trained.ending(Prompt::plain(tokenizer, &question.prompt)?);
        let sampling = Sampling { max_new_tokens: question.generate, temperature: 0.0, ..Sampling::default() };
        let mut past = Past::new(&trained.model);
        let written = answer((&trained.model, tokenizer), &mut past, &prompt, (&sampling, &[]), &mut |_| Ok(()))?;
        sum += question.score(&written.text);
    }
    progress("asking", rows, rows);
    Ok(sum / rows as f64)
}
