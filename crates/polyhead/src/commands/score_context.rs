//! `polyhead score-context`: how much the answers of conversations depend on what came before them (arXiv 2411.02688).

use std::io::IsTerminal;
use std::path::PathBuf;

use burn::tensor::{Int, Tensor, TensorData};
use clap::Args;
use polyhead_attention::{Mask, QuerySite};
use polyhead_data::Tokenizer;
use polyhead_evaluation::context_score::{Turns, context_scores, marked_message};
use polyhead_evaluation::hallucination::auroc;
use polyhead_models::sites::SitePlan;
use polyhead_models::{Decoder, Pass, Role};
use polyhead_recipe::Problems;
use polyhead_runs::answer::Prompt;
use polyhead_runs::{Failure, open_trained};
use serde_json::{Value, json};

use crate::allowed::caller;
use crate::console::{progress, put, talk};

/// Which conversations are scored by which layer.
#[derive(Debug, Args)]
pub struct ScoreContextArgs {
    /// A model that was fine-tuned on conversations: a run folder, a checkpoint, or a folder in Hugging Face's format.
    pub checkpoint: PathBuf,
    /// Conversations, a line of JSON each: {"messages": [{"role": "user", "content": "..."}, ...]}.
    #[arg(long, value_name = "FILE")]
    pub data: PathBuf,
    /// The layer whose heads are looked at, from 0. Default: as far up as layer 15 of 22, which the authors take.
    #[arg(long)]
    pub layer: Option<usize>,
    /// Above this score an answer depends on its context.
    #[arg(long, default_value_t = 0.6)]
    pub beta: f64,
    /// Also give the user's message before each answer as training on it takes it: behind it this word, where the answer depends
    /// on the context.
    #[arg(long, value_name = "WORD")]
    pub indicator: Option<String>,
    /// A field of the rows that is true or false: whether their answers depend on the context. How well scores tell the two apart is
    /// told at the end, as the area under the curve of true against false positives (AUROC).
    #[arg(long, value_name = "FIELD")]
    pub label: Option<String>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    pub device: Option<String>,
}

/// Prints a line of JSON for every answer.
pub fn score_context(args: &ScoreContextArgs) -> Result<(), Failure> {
    if !args.beta.is_finite() {
        return Err(Problems::plain(format!("--beta ({}) must be a finite number", args.beta)).into());
    }
    let trained = open_trained(&args.checkpoint, args.device.as_deref(), caller())?;
    let (model, tokenizer) = (&trained.model, trained.text_tokenizer()?);
    let layers = model.layers.len();
    let layer = args.layer.unwrap_or(((layers * 15) as f64 / 22.0).round() as usize).min(layers - 1);
    if let Some(asked) = args.layer.filter(|&asked| asked >= layers) {
        return Err(Problems::plain(format!("--layer ({asked}) must be below {layers}, from 0")).into());
    }
    let mechanism = model.config().mechanism(layer);
    if let Some(reason) = mechanism.absent(QuerySite::Weights.into()) {
        let problem = format!("--layer {layer}: {} has no weights to look at: {reason}", mechanism.name());
        return Err(Problems::plain(problem).into());
    }
    let text = std::fs::read_to_string(&args.data).map_err(|error| Failure::file("read", &args.data, error))?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let chats = lines.map(|(at, line)| {
        conversation(line, args.label.as_deref())
            .map(|(chat, label)| (at, chat, label))
            .map_err(|problem| Failure::Run(format!("{}:{at}: {problem}", args.data.display())))
    });
    let chats: Vec<(usize, Vec<Value>, Option<bool>)> = chats.collect::<Result<_, _>>()?;
    talk!("{} conversations, layer {layer} of {layers}", chats.len());
    // Lines on a terminal tell how far it is themselves.
    let watched = !std::io::stdout().is_terminal();
    let mut labelled = Vec::new();
    for (done, (at, messages, label)) in (1..).zip(&chats) {
        let place = |error: Failure| match error {
            Failure::Run(problem) => Failure::Run(format!("{}:{at}: {problem}", args.data.display())),
            other => other,
        };
        let prompt = Prompt::chat(tokenizer, messages).map_err(place)?;
        let length = prompt.ids.len().min(trained.max_positions);
        if length < prompt.ids.len() {
            talk!(
                "warning: {}:{at}: only the first {length} of {} tokens are read, for which the model was made",
                args.data.display(),
                prompt.ids.len()
            );
        }
        let turns = turns(&prompt.ids[..length], &prompt.roles[..length], tokenizer);
        let scores = context_scores(&maps(model, layer, &prompt.ids[..length]), &turns);
        let answers = messages.iter().enumerate().filter(|(_, message)| message["role"] == "assistant");
        // An answer without text is no turn of its own.
        let answers =
            answers.filter(|(_, message)| message["content"].as_str().is_some_and(|text| !text.trim().is_empty()));
        for (number, (message, _)) in answers.enumerate() {
            let score = scores.turns.get(number).copied().flatten();
            let tokens = turns.responses.get(number).map_or(0, |own| own.iter().filter(|is| **is).count());
            labelled.extend(score.zip(*label));
            let depends = score.map(|score| score > args.beta);
            let mut told =
                json!({ "row": at, "message": message, "tokens": tokens, "score": score, "depends": depends });
            let user = messages[..message].iter().rev().find(|message| message["role"] == "user");
            if let (Some(word), Some(user), Some(score)) =
                (&args.indicator, user.and_then(|own| own["content"].as_str()), score)
            {
                told["marked"] = json!(marked_message(user, score, args.beta, word));
            }
            put!("{told}")?;
        }
        if watched {
            progress("scoring", done, chats.len() as u64);
        }
    }
    if let Some(field) = &args.label {
        let depend = labelled.iter().filter(|(_, depends)| *depends).count();
        let [of, others] = [depend, labelled.len() - depend].map(|count| format!("{count} answers"));
        match auroc(&labelled) {
            Some(area) => {
                talk!("AUROC {area:.4}: {of} of which \"{field}\" is true against {others} of which it is false")
            }
            None => talk!("no AUROC: {of} of which \"{field}\" is true, and {others} of which it is false"),
        }
    }
    Ok(())
}

/// The messages of a line, and its label, where one is asked for.
fn conversation(line: &str, label: Option<&str>) -> Result<(Vec<Value>, Option<bool>), String> {
    let row: Value = serde_json::from_str(line).map_err(|error| format!("invalid JSON: {error}"))?;
    let messages = row["messages"].as_array().cloned().unwrap_or_default();
    let whole = |message: &Value| message["role"].is_string() && message["content"].is_string();
    if messages.is_empty() || !messages.iter().all(whole) {
        return Err("needs \"messages\", a list of {\"role\": \"user\", \"content\": \"...\"}".into());
    }
    let labelled =
        |field: &str| row[field].as_bool().ok_or_else(|| format!("needs \"{field}\", true or false (--label)"));
    Ok((messages, label.map(labelled).transpose()?))
}

/// Whose the tokens are: line breaks are nobody's, as in the authors' code; what tools gave back counts as the user's (ours).
fn turns(ids: &[u32], roles: &[Role], tokenizer: &Tokenizer) -> Turns {
    let is_break = |at: usize| tokenizer.decode(&ids[at..=at]).chars().all(|sign| sign == '\n' || sign == '\r');
    let user = |at: usize| matches!(roles[at], Role::System | Role::User | Role::Tool) && !is_break(at);
    let mut responses: Vec<Vec<bool>> = Vec::new();
    for at in (0..ids.len()).filter(|&at| roles[at] == Role::Assistant) {
        if at == 0 || roles[at - 1] != Role::Assistant {
            responses.push(vec![false; ids.len()]);
        }
        responses.iter_mut().last().into_iter().for_each(|own| own[at] = true);
    }
    let template = roles.iter().map(|&role| role == Role::Template).collect();
    Turns { template, user: (0..ids.len()).map(user).collect(), responses }
}

/// The maps of a layer, `[heads][queries * keys]`.
fn maps(model: &Decoder, layer: usize, ids: &[u32]) -> Vec<Vec<f32>> {
    let data: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(data, [1, ids.len()]), &model.device());
    let sites = SitePlan { edits: Vec::new(), taps: vec![(layer, QuerySite::Weights.into())] };
    let read = model.run_layers(0..layer + 1, model.embed(tokens), Pass { sites, ..Pass::new(&Mask::causal()) }).taps;
    let numbers: Vec<f32> = read[0].values.clone().into_data().iter::<f32>().collect();
    numbers.chunks(ids.len() * ids.len()).map(<[f32]>::to_vec).collect()
}
