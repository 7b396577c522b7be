//! `polyhead generate` and `polyhead chat`: text from a trained model.

use std::io::{BufRead, IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use polyhead_attention::QuerySite;
use polyhead_data::Tokenizer;
use polyhead_evaluation::sgrs::{Accepted, SgrsConfig, Writing, target_layers};
use polyhead_models::intervention::Context;
use polyhead_models::{Decoder, DiffusionSampling, Past, Sampling};
use polyhead_recipe::Problems;
use polyhead_runs::answer::{Answer, Finish, Prompt, Question, answer, answers};
use polyhead_runs::{Failure, Trained, open_decoder};
use serde_json::{Value, json};

use crate::allowed::user;
use crate::cli::{ChatArgs, GenerateArgs, SamplingArgs};
use crate::console::{harmless, print, progress, put, talk, wants_json};

impl SamplingArgs {
    /// How tokens are chosen, after a check.
    fn sampling(&self) -> Result<Sampling, Failure> {
        let Self { temperature, top_p, diffusion_steps: steps, block_length, .. } = *self;
        let diffusion = DiffusionSampling { steps, block_length };
        diffusion
            .validate()
            .map_err(|error| Problems::plain(format!("--diffusion-steps, --block-length: {}", error.problem)))?;
        if !(temperature >= 0.0 && top_p > 0.0 && top_p <= 1.0) {
            let problem =
                format!("--temperature ({temperature}) must be 0 or more, --top-p ({top_p}) above 0 and up to 1");
            return Err(Problems::plain(problem).into());
        }
        let max_new_tokens = self.max_new_tokens;
        Ok(Sampling { max_new_tokens, temperature, top_k: self.top_k, top_p, seed: self.seed, diffusion })
    }
}

/// Continues a prompt on standard output, or many prompts as JSON lines.
pub fn generate(args: &GenerateArgs) -> Result<(), Failure> {
    let sampling = args.sampling.sampling()?;
    let trained = open_decoder(&args.checkpoint, args.sampling.device.as_deref(), user())?;
    let trained = trained.intervened(args.intervention.as_deref())?;
    if let Some(file) = &args.prompts {
        return generate_all(&trained, file, (args, &sampling));
    }
    let mut piped = String::new();
    let text = match args.prompt.as_str() {
        "-" => {
            let bytes = std::io::stdin().read_to_string(&mut piped);
            bytes.map_err(|error| Failure::Run(format!("cannot read the prompt from standard input: {error}")))?;
            piped.strip_suffix('\n').unwrap_or(&piped)
        }
        text => text,
    };
    let started = Instant::now();
    let prompt = prompt(&trained, args, text)?;
    if let Some(alpha) = args.sgrs {
        return accepted(&trained, (text, &prompt), (alpha, args));
    }
    let shown = if args.chat { "" } else { text };
    let model = (&trained.model, trained.text_tokenizer()?);
    let mut past = Past::new(model.0);
    let answer = write_text(model, &mut past, (shown, &prompt), (&sampling, &args.sampling.stop))?;
    let (count, read, reading) = (answer.tokens.len(), prompt.ids.len(), past.reading.as_secs_f64());
    let rate = count as f64 / started.elapsed().as_secs_f64().max(1e-9);
    talk!("{count} tokens, {rate:.1} tokens/s; {read} tokens of the prompt read in {reading:.3} s");
    if wants_json() { put!("{:#}", as_json(text, &answer)) } else { Ok(()) }
}

/// Continues a prompt by tokens that are accepted by their saliency.
fn accepted(
    trained: &Trained,
    (text, prompt): (&str, &Prompt),
    (alpha, args): (f64, &GenerateArgs),
) -> Result<(), Failure> {
    let refuse = |problem: String| Err(Problems::plain(problem).into());
    if !(alpha.is_finite() && alpha >= 0.0) {
        return refuse(format!("--sgrs ({alpha}) must be 0 or more"));
    }
    let (path, config) = (trained.path.display(), trained.model.config());
    let absent = |layer: usize| config.mechanism(layer).absent(QuerySite::Weights.into());
    let layers: Vec<usize> =
        target_layers(trained.model.layers.len()).filter(|&layer| absent(layer).is_none()).collect();
    if layers.is_empty() || trained.model.is_masked_diffusion() {
        return refuse(format!(
            "--sgrs: {path} has no causal maps in the layers {:?}",
            target_layers(trained.model.layers.len())
        ));
    }
    let tokenizer = trained.text_tokenizer()?;
    let SamplingArgs { max_new_tokens, seed, .. } = args.sampling;
    let how = Writing { layers: &layers, max_new_tokens, stops: &prompt.stops, seed };
    let model = trained.model.clone().fork(&trained.model.device().autodiff()).train();
    let mut done = 0;
    let written = SgrsConfig { alpha, ..SgrsConfig::default() }.write(&model, &prompt.ids, how, &mut |_| {
        done += 1;
        progress("generating", done, max_new_tokens as u64);
        ControlFlow::Continue(())
    });
    let ids: Vec<u32> =
        written.iter().map(|own| own.token as u32).filter(|token| !prompt.stops.contains(token)).collect();
    show(if args.chat { "" } else { text })?;
    show(&tokenizer.decode(&ids))?;
    put!("")?;
    let count = |of: &dyn Fn(&Accepted) -> bool| written.iter().filter(|own| of(own)).count();
    talk!(
        "{} tokens: {} accepted at the first draw, {} after rejections, {} taken as the most salient",
        written.len(),
        count(&|own| own.passed && own.tries == 1),
        count(&|own| own.passed && own.tries > 1),
        count(&|own| !own.passed)
    );
    Ok(())
}

/// The tokens of a text: as what is continued, or with --chat as what is answered.
fn prompt(trained: &Trained, args: &GenerateArgs, text: &str) -> Result<Prompt, Failure> {
    let tokenizer = trained.text_tokenizer()?;
    let prompt = match args.chat {
        true => Prompt::chat(tokenizer, &[system(args.system.as_deref()), vec![message("user", text)]].concat())?,
        false => Prompt::plain(tokenizer, text)?,
    };
    let context =
        Context { rows: 1, tokens: &prompt.ids, roles: &prompt.roles, prompt: prompt.ids.len(), ..Context::default() };
    trained.check_spans(&context, prompt.ids.len().saturating_add(args.sampling.max_new_tokens))?;
    Ok(trained.ending(prompt))
}

fn system(text: Option<&str>) -> Vec<Value> {
    text.iter().map(|text| message("system", text)).collect()
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

/// Writes a prompt and what the model makes of it to standard output, as it comes; gives the latter.
pub fn write_text(
    model: (&Decoder, &Tokenizer),
    past: &mut Past,
    (shown, prompt): (&str, &Prompt),
    how: (&Sampling, &[String]),
) -> Result<Answer, Failure> {
    show(shown)?;
    let answer = answer(model, past, prompt, how, &mut show)?;
    show("\n")?;
    Ok(answer)
}

/// Text on standard output, in which nothing steers a terminal. JSON comes as a whole, once all is known.
fn show(text: &str) -> Result<(), Failure> {
    match std::io::stdout().is_terminal() {
        _ if wants_json() => Ok(()),
        true => print(format_args!("{}", harmless(text))),
        false => print(format_args!("{text}")),
    }
}

/// A prompt and what became of it, for programs.
fn as_json(prompt: &str, Answer { text, tokens, finish, .. }: &Answer) -> Value {
    json!({ "prompt": prompt, "text": text, "tokens": tokens.len(), "finish": finish.name() })
}

/// Continues every prompt of a file, and prints a JSON line for each, in their order.
fn generate_all(trained: &Trained, file: &Path, (args, sampling): (&GenerateArgs, &Sampling)) -> Result<(), Failure> {
    let tokenizer = trained.text_tokenizer()?;
    let texts = prompts(file)?;
    let prompts = texts.iter().map(|text| prompt(trained, args, text)).collect::<Result<Vec<_>, _>>()?;
    let questions: Vec<Question> = (0..)
        .zip(&prompts)
        .map(|(stream, prompt)| Question { prompt, sampling, until: &args.sampling.stop, stream })
        .collect();
    let (mut written, mut done) = (vec![Value::Null; prompts.len()], 0);
    let mut hear = |at: usize, _: &str, answer: Option<Answer>| {
        if let Some(answer) = answer {
            written[at] = as_json(&texts[at], &answer);
            done += 1;
            progress("generating", done, prompts.len() as u64);
        }
        ControlFlow::Continue(())
    };
    answers((&trained.model, tokenizer), &questions, &mut hear, &|| true);
    written.iter().try_for_each(|answer| put!("{answer}"))
}

/// The prompts of a file: a line each, or of JSON lines (`.jsonl`) their `prompt`.
pub(super) fn prompts(file: &Path) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| Failure::file("read", file, error))?;
    let rows = file.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl"));
    let of_line = |(at, line): (usize, &str)| match rows {
        false => Ok(line.to_owned()),
        true => {
            let place = format!("{}:{}", file.display(), at + 1);
            let row: Value =
                serde_json::from_str(line).map_err(|error| Failure::Run(format!("{place}: invalid JSON: {error}")))?;
            let prompt = row.get("prompt").and_then(Value::as_str).map(str::to_owned);
            prompt.ok_or_else(|| {
                Failure::Run(format!("{place}: needs \"prompt\" with a text, as in {{\"prompt\": \"Ownership is\"}}"))
            })
        }
    };
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(of_line).collect::<Result<Vec<_>, _>>()?;
    match prompts.is_empty() {
        true => Err(Failure::Run(format!("{}: contains no prompt; write one a line", file.display()))),
        false => Ok(prompts),
    }
}

/// Talks with a model: what is typed is a user's message, what the model writes its answer.
pub fn chat(args: &ChatArgs) -> Result<(), Failure> {
    let sampling = args.sampling.sampling()?;
    let trained = open_decoder(&args.checkpoint, args.sampling.device.as_deref(), user())?;
    let tokenizer = trained.text_tokenizer()?;
    let opening = system(args.system.as_deref());
    // Refused here, not behind the first message.
    Prompt::chat(tokenizer, &[opening.clone(), vec![message("user", "?")]].concat())?;
    let on_terminal = std::io::stdin().is_terminal();
    if on_terminal {
        talk!("/new starts a new conversation, Ctrl-D ends");
    }
    let (mut messages, mut past) = (opening.clone(), Past::new(&trained.model));
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if on_terminal {
            print(format_args!("> "))?;
        }
        let Some(line) = lines.next() else { break };
        let line = line.map_err(|error| Failure::Run(format!("cannot read from standard input: {error}")))?;
        match line.trim() {
            "" => continue,
            "/new" => {
                messages.clone_from(&opening);
                continue;
            }
            text => messages.push(message("user", text)),
        }
        let prompt = trained.ending(Prompt::chat(tokenizer, &messages)?);
        let whole = prompt.ids.len().saturating_add(sampling.max_new_tokens);
        if whole > trained.max_positions {
            let most = trained.max_positions;
            talk!(
                "warning: with an answer the conversation has up to {whole} tokens, more than the {most} that the model was made for; /new starts a new one"
            );
        }
        let model = (&trained.model, tokenizer);
        let written = answer(model, &mut past, &prompt, (&sampling, &args.sampling.stop), &mut show)?;
        put!("")?;
        if written.finish == Finish::Length {
            talk!("(cut at --max-new-tokens {})", sampling.max_new_tokens);
        }
        messages.push(message("assistant", &written.text));
    }
    Ok(())
}
