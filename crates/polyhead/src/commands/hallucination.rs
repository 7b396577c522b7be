//! `polyhead eval --task eigenscore` and `--task facts`: how much a model hallucinates.

use std::fmt::Write;
use std::path::Path;

use polyhead_evaluation::ees::{EesConfig, EesMode, Probes};
use polyhead_evaluation::eigenscore::{EigenScore, matrix};
use polyhead_evaluation::hallucination::{Asking, Summary, ask};
use polyhead_evaluation::sensitivity::Rows;
use polyhead_evaluation::texts::answer_embeddings;
use polyhead_models::{Batch, Decoder, Sampling};
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::allowed::caller;
use crate::cli::EvalArgs;
use crate::console::{harmless, progress, put, talk};
use polyhead_recipe::Problems;
use polyhead_runs::data::world;
use polyhead_runs::{Failure, Trained, intervention, open_trained};

/// Refuses what says nothing about these tasks, and gives how EES is computed.
fn ees_of(args: &EvalArgs) -> Result<EesConfig, Failure> {
    let task = &args.task[0];
    let refuse = |holds: bool, problem: String| if holds { Ok(()) } else { Err(Problems::plain(problem)) };
    refuse(args.samples >= 2, {
        format!("--samples ({}) must be at least 2 for --task {task}, which compares answers", args.samples)
    })?;
    for (name, given) in [
        ("--lengths", !args.lengths.is_empty()),
        ("--unit", args.unit.is_some()),
        ("--heatmap", args.heatmap.is_some()),
        ("--prompts", args.prompts.is_some() && task == "facts"),
    ] {
        refuse(!given, format!("{name} says nothing about --task {task}: leave it out"))?;
    }
    let mut config = EesConfig::default();
    if let Some(name) = &args.ees_mode {
        config.mode = named(name)?;
    }
    if config.mode == EesMode::Official {
        config.probes = Probes::Gaussian;
    }
    if let Some(name) = &args.ees_probes {
        config.probes = named(name)?;
    }
    config.n_probes = args.ees_n_probes.unwrap_or(config.n_probes);
    match config.validate().into_iter().next() {
        Some(error) => Err(Problems::plain(format!("--ees-n-probes: {}", error.problem)).into()),
        None => Ok(config),
    }
}

/// A choice by its name.
fn named<T: DeserializeOwned>(name: &str) -> Result<T, Failure> {
    serde_json::from_value(json!(name)).map_err(|error| Problems::plain(format!("{name}: {error}")).into())
}

/// Scores how far apart the answers to each line of a file are.
pub fn eigenscore(args: &EvalArgs) -> Result<(), Failure> {
    let file = args.prompts.as_deref().ok_or_else(|| {
        Problems::plain("--task eigenscore takes its prompts from a file, one a line: name it with --prompts".into())
    })?;
    let ees = ees_of(args)?;
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
    let tokenizer = trained.text_tokenizer()?;
    let end = tokenizer.end_of_text();
    let stops = end.as_slice();
    let layer = layer_of(args, &trained.model)?;
    let sampling = Sampling { max_new_tokens: args.max_new_tokens, seed: args.seed, ..Sampling::eigenscore() };
    let mut prompts = Vec::new();
    let mut sums = vec![0.0; SCORES.len()];
    talk!("{} answers of up to {} tokens each, layer {layer}", args.samples, args.max_new_tokens);
    let asked = lines(file)?;
    let encoded = asked.iter().map(|prompt| tokenizer.encode_prompt(prompt)).collect::<Result<Vec<_>, _>>()?;
    check_prompts(&trained, &encoded)?;
    for (done, (prompt, ids)) in asked.iter().zip(encoded).enumerate() {
        let rows = answer_embeddings(&trained.model, &ids, args.samples, &sampling, stops, layer);
        let scores = SCORES.map(|(_, score)| score(&rows, &ees, args.seed));
        scores.iter().zip(&mut sums).for_each(|(score, sum)| *sum += score);
        let mut entry = json!({ "prompt": prompt });
        SCORES.iter().zip(scores).for_each(|((name, _), score)| entry[*name] = json!(score));
        talk!("{:>9.4}  {}", scores[0], harmless(prompt));
        prompts.push(entry);
        progress("answering", done as u64 + 1, asked.len() as u64);
    }
    let mut mean = json!({});
    SCORES.iter().zip(sums).for_each(|((name, _), sum)| mean[*name] = json!(sum / prompts.len() as f64));
    put!(
        "{:#}",
        json!({ "checkpoint": trained.path, "layer": layer, "samples": args.samples, "seed": args.seed, "ees": ees,
        "mean": mean, "prompts": prompts })
    )
}

type Score = fn(&Rows, &EesConfig, u64) -> f64;

/// What is told of each prompt: names in the JSON, scores of `[answers][d_model]`.
const SCORES: [(&str, Score); 5] = [
    ("eigenscore", |rows, _, _| EigenScore::Inside.of(&matrix(rows))),
    ("eigenscore_of_the_code", |rows, _, _| EigenScore::InsideCode.of(&matrix(rows))),
    ("ees", |rows, ees, seed| ees.of(&matrix(rows).transpose(), seed)),
    ("ees_exact", |rows, _, seed| {
        EesConfig { mode: EesMode::Exact, ..EesConfig::default() }.of(&matrix(rows).transpose(), seed)
    }),
    // With 20 normal probes, as published.
    ("ees_official", |rows, _, seed| {
        let official = EesConfig { mode: EesMode::Official, probes: Probes::Gaussian, ..EesConfig::default() };
        official.of(&matrix(rows).transpose(), seed)
    }),
];

fn lines(file: &Path) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| Failure::file("read", file, error))?;
    let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(Into::into).collect();
    match lines.is_empty() {
        true => Err(Failure::Run(format!("{}: holds no prompt; write one a line", file.display()))),
        false => Ok(lines),
    }
}

/// The layer that `--layer` means, from 0.
fn layer_of(args: &EvalArgs, model: &Decoder) -> Result<usize, Failure> {
    let layers = model.layers.len() as i64;
    let counted = if args.layer < 0 { layers + args.layer } else { args.layer };
    match (0..layers).contains(&counted) {
        true => Ok(counted as usize),
        false => {
            let problem = format!("--layer ({}) must be {} to {}", args.layer, -layers, layers - 1);
            Err(Problems::plain(problem).into())
        }
    }
}

/// Refuses prompts of which none has a span of the model's intervention; tells of each span that some of them lack.
fn check_prompts(trained: &Trained, prompts: &[Vec<u32>]) -> Result<(), Failure> {
    let batch = |at: u64| Ok(Batch::text(prompts[at as usize].clone()));
    let rows = intervention::Rows { called: "prompts", batches: prompts.len() as u64, batch: &batch, generates: true };
    trained.check_rows(&rows)?.iter().for_each(|note| talk!("note: {note}"));
    Ok(())
}

/// Asks a model all questions about the world of facts that it was trained on.
pub fn facts(args: &EvalArgs) -> Result<(), Failure> {
    let ees = ees_of(args)?;
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
    let world = trained.recipe.as_ref().and_then(world).ok_or_else(|| {
        let path = trained.path.display();
        Failure::Run(format!("{path} did not learn generated facts: --task facts asks about those of [data.facts]"))
    })?;
    let prompts: Vec<Vec<u32>> = world.questions().into_iter().map(|question| question.prompt).collect();
    check_prompts(&trained, &prompts)?;
    let mut asking = Asking::new(world.end(), trained.model.layers.len());
    asking.samples = args.samples;
    asking.ees.clone_from(&ees);
    asking.sampling.seed = args.seed;
    asking.layer = layer_of(args, &trained.model)?;
    let summary =
        Summary::of(&ask(&trained.model, &world.questions(), &asking, &|| true).unwrap_or_default(), asking.confident);
    let mut table = String::new();
    for (name, value) in summary.numbers() {
        // Writing to a string cannot fail.
        let _ = writeln!(table, "{name:<28} {value:>8.4}");
    }
    talk!("{}", table.trim_end());
    put!(
        "{:#}",
        json!({ "checkpoint": trained.path, "samples": args.samples, "seed": args.seed, "ees": ees, "facts": summary })
    )
}
