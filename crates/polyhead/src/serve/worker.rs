//! The thread that owns the model. It takes all requests that are waiting and answers them together.

use std::ops::ControlFlow;
use std::sync::mpsc::Receiver;

use polyhead_data::{StreamDecoder, Tokenizer};
use polyhead_evaluation::likelihood::{Likelihood, likelihoods};
use polyhead_models::Decoder;
use polyhead_runs::answer::{Answer, Finish, Question, answers};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::asked::{Asked, MOST};

/// One answer.
#[derive(Clone)]
pub struct Choice {
    /// Its text, behind the prompt's where that was asked for.
    pub text: String,
    /// Why there is no more.
    pub finish: Finish,
    /// How probable its tokens are, as OpenAI's completions write it.
    pub logprobs: Value,
}

/// All answers of a request.
pub struct Answered {
    /// Prompt by prompt.
    pub choices: Vec<Choice>,
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens that were written.
    pub completion_tokens: usize,
}

/// What is sent back while a request is worked on.
pub enum Event {
    /// Text as it comes, of a request that is streamed.
    Text(String),
    /// The end.
    Done(Answered),
}

/// A request, and where its answer goes.
pub struct Job {
    /// What is asked for.
    pub asked: Asked,
    /// Who waits; a closed one has gone.
    pub reply: UnboundedSender<Event>,
}

/// Answers requests until there are no more. Once `stopping` is set, those on their way are dropped, which their clients are
/// told.
pub fn work(model: &Decoder, tokenizer: &Tokenizer, jobs: &Receiver<Job>, stopping: &watch::Receiver<bool>) {
    while let Ok(job) = jobs.recv() {
        let (mut together, mut rows) = (Vec::new(), 0);
        for job in std::iter::once(job).chain(jobs.try_iter()) {
            rows += job.asked.rows();
            together.push(job);
            if rows >= MOST {
                break;
            }
        }
        answer_together((model, tokenizer), &together, &|| !*stopping.borrow());
    }
}

/// Answers some requests; each gets its answer as soon as all of it is there. `None` where `go_on` says no.
fn answer_together((model, tokenizer): (&Decoder, &Tokenizer), jobs: &[Job], go_on: &dyn Fn() -> bool) -> Option<()> {
    let (mut questions, mut whose) = (Vec::new(), Vec::new());
    for (job, Job { asked, .. }) in jobs.iter().enumerate() {
        let prompts = asked.prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, asked.n));
        for (stream, prompt) in (0u64..).zip(prompts) {
            questions.push(Question { prompt, sampling: &asked.sampling, until: &asked.until, stream });
            whose.push(job);
        }
    }
    let mut written: Vec<Vec<Option<Answer>>> = jobs.iter().map(|job| vec![None; job.asked.rows()]).collect();
    let mut hear = |at: usize, text: &str, answer: Option<Answer>| {
        let Job { asked, reply } = &jobs[whose[at]];
        if asked.stream && !text.is_empty() {
            // Who has gone is found below.
            let _ = reply.send(Event::Text(text.to_owned()));
        }
        if let Some(answer) = answer {
            let written = &mut written[whose[at]];
            written[questions[at].stream as usize] = Some(answer);
            if asked.logprobs.is_none() && written.iter().all(Option::is_some) {
                let answers = std::mem::take(written).into_iter().flatten().collect();
                let _ = reply.send(Event::Done(answered(tokenizer, asked, answers, &[])));
            }
        }
        if reply.is_closed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    answers((model, tokenizer), &questions, &mut hear, go_on)?;
    for (Job { asked, reply }, written) in jobs.iter().zip(written) {
        let Some(best) = asked.logprobs.filter(|_| !reply.is_closed()) else { continue };
        let answers: Vec<Answer> = written.into_iter().flatten().collect();
        let texts = asked.texts(&answers);
        let found = likelihoods(model, &texts, best, go_on)?;
        let _ = reply.send(Event::Done(answered(tokenizer, asked, answers, &found)));
    }
    Some(())
}

/// The answers to a request as they are sent. `found` are the likelihoods of their texts; empty where none are asked for.
fn answered(tokenizer: &Tokenizer, asked: &Asked, answers: Vec<Answer>, found: &[Vec<Likelihood>]) -> Answered {
    let completion_tokens = answers.iter().map(|answer| answer.tokens.len()).sum();
    let texts = asked.texts(&answers);
    let choices = answers.into_iter().enumerate().map(|(at, answer)| {
        let prompt = &asked.prompts[at / asked.n].ids;
        let from = if asked.echo { 0 } else { prompt.len() };
        let logprobs = found.get(at).map_or(Value::Null, |found| logprobs(tokenizer, &texts[at], found, from));
        let echoed = if asked.echo { tokenizer.decode(prompt) } else { String::new() };
        Choice { text: echoed + &answer.text, finish: answer.finish, logprobs }
    });
    let prompt_tokens = asked.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    Answered { choices: choices.collect(), prompt_tokens, completion_tokens }
}

/// The tokens of a text from position `from` on, spelt as in the vocabulary, so that no two look alike, with the logarithms of
/// their probabilities; the first of all has none. Offsets are characters from the beginning of the prompt.
fn logprobs(tokenizer: &Tokenizer, text: &[u32], found: &[Likelihood], from: usize) -> Value {
    let shown = |id: u32| tokenizer.token_text(id);
    let of = |at: usize| at.checked_sub(1).and_then(|before| found.get(before));
    let best = |of: &Likelihood| -> Value {
        of.best.iter().map(|&(id, value)| (shown(id), json!(value))).collect::<Map<String, Value>>().into()
    };
    let places = from..text.len();
    let (mut stream, mut signs) = (StreamDecoder::new(tokenizer), 0);
    let mut start = |&id: &u32| {
        let start = signs;
        signs += stream.push(id).map_or(0, |text| text.chars().count());
        start
    };
    let offsets: Vec<usize> = text.iter().map(&mut start).collect();
    json!({
        "tokens": text[from..].iter().map(|&id| shown(id)).collect::<Vec<_>>(),
        "token_logprobs": places.clone().map(|at| of(at).map(|of| of.log_probability)).collect::<Vec<_>>(),
        "top_logprobs": places.map(|at| of(at).map(best)).collect::<Vec<_>>(),
        "text_offset": offsets[from..],
    })
}
