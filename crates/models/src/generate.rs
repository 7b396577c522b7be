//! Text from a model, token by token, with cached keys and values.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{Cache, Mask};
use polyhead_kernels::on_the_pool;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::intervention::Context;
use crate::{Decoder, DiffusionSampling, Pass, Role};

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Tokens to generate at most. Default: 200.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token. Default: 0.8.
    pub temperature: f64,
    /// Choose among the k likeliest tokens only; 0 among all. Default: 0.
    pub top_k: usize,
    /// Choose among the likeliest tokens whose probabilities add up to this. Default: 1, all of them.
    pub top_p: f64,
    /// The same seed gives the same text. Default: 0.
    pub seed: u64,
    /// How a masked diffusion model generates, which takes no notice of top_k and top_p.
    #[serde(skip_serializing_if = "DiffusionSampling::is_default")]
    pub diffusion: DiffusionSampling,
}

impl Default for Sampling {
    fn default() -> Self {
        let diffusion = DiffusionSampling::default();
        Self { max_new_tokens: 200, temperature: 0.8, top_k: 0, top_p: 1.0, seed: 0, diffusion }
    }
}

impl Sampling {
    /// What EigenScore samples with (arXiv 2402.03744), SenD's number of tokens (arXiv 2410.15460).
    pub fn eigenscore() -> Self {
        Self { max_new_tokens: 128, temperature: 0.5, top_k: 10, top_p: 0.99, ..Self::default() }
    }
}

/// What a model wrote after a prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Continuation {
    /// Its tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// The stop token, if one came.
    pub stop: Option<u32>,
    /// Mean entropy in nats of the distributions that it was chosen from, before temperature and limits.
    pub entropy: f64,
    /// Logarithm of its probability (the stop token included), before temperature and limits.
    pub log_probability: f64,
}

/// A prompt to continue, and how.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Its tokens, at least one.
    pub prompt: &'a [u32],
    /// Whose each of them is, for the model's intervention; empty where nobody says so, of all requests of a call or of none.
    pub roles: &'a [Role],
    /// How tokens are chosen, and how many.
    pub sampling: &'a Sampling,
    /// Tokens that end it.
    pub stops: &'a [u32],
    /// Which of the streams of random numbers of its seed it draws from.
    pub stream: u64,
}

/// Continues prompts of equal length (not 0), many at a time, each until one of `stops` or `max_new_tokens`. The numbers that a
/// row draws depend on the seed and the row's place only. Asks `go_on` before every token; `None` once it says no. Call it on
/// `model.valid()`.
///
/// # Panics
/// If the prompts differ in length.
pub fn continuations(
    model: &Decoder,
    prompts: &[Vec<u32>],
    sampling: &Sampling,
    stops: &[u32],
    go_on: &dyn Fn() -> bool,
) -> Option<Vec<Continuation>> {
    let places = (0u64..).zip(prompts);
    let requests: Vec<Request> =
        places.map(|(stream, prompt)| Request { prompt, roles: &[], sampling, stops, stream }).collect();
    continue_all(model, &requests, &mut |_, _| ControlFlow::Continue(()), go_on)
}

/// The same for requests of their own kinds, whose prompts are equally long. `on_token` gets each row whenever it is one token
/// longer or has ended, and may end it.
///
/// # Panics
/// If the prompts differ in length.
pub fn continue_all(
    model: &Decoder,
    requests: &[Request],
    on_token: &mut dyn FnMut(usize, &Continuation) -> ControlFlow<()>,
    go_on: &dyn Fn() -> bool,
) -> Option<Vec<Continuation>> {
    let length = requests.first().map_or(0, |request| request.prompt.len());
    assert!(requests.iter().all(|request| request.prompt.len() == length), "prompts of one call are equally long");
    if model.is_masked_diffusion() {
        return diffuse_all(model, requests, on_token, go_on);
    }
    let mut rows = Vec::with_capacity(requests.len());
    for requests in requests.chunks(ROWS) {
        let first = rows.len();
        rows.extend(requests.iter().map(Row::new));
        let mut cache = model.new_cache();
        let prompts: Vec<u32> = requests.iter().flat_map(|request| request.prompt).copied().collect();
        let roles: Vec<Role> = requests.iter().flat_map(|request| request.roles).copied().collect();
        let context =
            Context { rows: requests.len(), tokens: &prompts, roles: &roles, prompt: length, ..Context::default() };
        let mut next = prompts.clone();
        while rows[first..].iter().any(|row| row.open) {
            if !go_on() {
                return None;
            }
            let logits = next_logits(model, &next, context, &mut cache);
            next.clear();
            for ((at, row), logits) in rows[first..].iter_mut().enumerate().zip(logits.chunks(model.vocab_size())) {
                // A row that has ended goes on with the others, but nothing is kept of it.
                if !row.open {
                    next.push(0);
                    continue;
                }
                let request = &requests[at];
                next.push(row.written.extend(logits, request.sampling, &mut row.rng, request.stops));
                let goes_on = on_token(first + at, &row.written).is_continue();
                row.open =
                    goes_on && row.written.stop.is_none() && row.written.tokens.len() < request.sampling.max_new_tokens;
            }
        }
    }
    Some(rows.into_iter().map(|row| row.written).collect())
}

/// The same of a masked diffusion model, whose tokens do not come in order: they are handed out once all are there.
fn diffuse_all(
    model: &Decoder,
    requests: &[Request],
    on_token: &mut dyn FnMut(usize, &Continuation) -> ControlFlow<()>,
    go_on: &dyn Fn() -> bool,
) -> Option<Vec<Continuation>> {
    let mut all = Vec::with_capacity(requests.len());
    for (at, Request { prompt, sampling, stops, stream, .. }) in requests.iter().enumerate() {
        let mut written = Continuation::default();
        for token in model.diffuse(prompt, sampling, *stream, go_on)? {
            written.stop = stops.contains(&token).then_some(token);
            if written.stop.is_none() {
                written.tokens.push(token);
            }
            if on_token(at, &written).is_break() || written.stop.is_some() {
                break;
            }
        }
        all.push(written);
    }
    Some(all)
}

/// A request on its way.
struct Row {
    written: Continuation,
    rng: ChaCha8Rng,
    open: bool,
}

impl Row {
    fn new(request: &Request) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(request.sampling.seed);
        rng.set_stream(request.stream);
        Self { written: Continuation::default(), rng, open: request.sampling.max_new_tokens > 0 }
    }
}

/// Rows that are continued at a time; chosen by us.
const ROWS: usize = 64;

impl Continuation {
    /// Chooses one more token, or ends.
    fn extend(&mut self, logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng, stops: &[u32]) -> u32 {
        let token = choose(logits, sampling, rng);
        let best = logits.iter().fold(f32::NEG_INFINITY, |best, &logit| best.max(logit));
        let shifted = || logits.iter().map(|&logit| f64::from(logit - best));
        let all: f64 = shifted().map(f64::exp).sum();
        // H = ln Σ e^l - Σ p l
        let entropy = all.ln() - shifted().map(|l| l.exp() / all * l).sum::<f64>();
        let seen = self.tokens.len() as f64;
        self.entropy = (self.entropy * seen + entropy) / (seen + 1.0);
        self.log_probability += f64::from(logits[token as usize] - best) - all.ln();
        self.stop = stops.contains(&token).then_some(token);
        if self.stop.is_none() {
            self.tokens.push(token);
        }
        token
    }
}

/// What a model has read and written so far, with its cache. A prompt that goes on from there costs its new tokens only.
#[derive(Debug)]
pub struct Past {
    /// Whose each token of the prompt is, for the model's intervention; empty where nobody says so.
    pub roles: Vec<Role>,
    /// How long the last prompt took, up to its first new token.
    pub reading: Duration,
    cache: Cache,
    tokens: Vec<u32>,
}

impl Past {
    /// Nothing yet.
    pub fn new(model: &Decoder) -> Self {
        Self { roles: Vec::new(), reading: Duration::ZERO, cache: model.new_cache(), tokens: Vec::new() }
    }

    /// Reads `tokens` (not empty), which follow what was read; gives the logits after the last of them.
    fn read(&mut self, model: &Decoder, tokens: &[u32], prompt: &[u32]) -> Vec<f32> {
        self.tokens.extend(tokens);
        let context =
            Context { rows: 1, tokens: prompt, roles: &self.roles, prompt: prompt.len(), ..Context::default() };
        next_logits(model, tokens, context, &mut self.cache)
    }

    /// Continues `prompt` (not empty), a text from its very beginning, handing each new token to `on_token` as it comes; stops
    /// at one of `stops`, at `max_new_tokens`, or when `on_token` says so. Call it on `model.valid()`.
    ///
    /// Returns the new tokens, without the stop token, and that, if it came.
    pub fn generate(
        &mut self,
        model: &Decoder,
        prompt: &[u32],
        sampling: &Sampling,
        stops: &[u32],
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> (Vec<u32>, Option<u32>) {
        if model.is_masked_diffusion() {
            let request = Request { prompt, roles: &self.roles, sampling, stops, stream: 0 };
            let mut tell = |_: usize, written: &Continuation| match (written.stop, written.tokens.last()) {
                (None, Some(&token)) => on_token(token),
                _ => ControlFlow::Break(()),
            };
            let written = diffuse_all(model, &[request], &mut tell, &|| true).and_then(|mut all| all.pop());
            return written.map_or_else(Default::default, |written| (written.tokens, written.stop));
        }
        if !(prompt.starts_with(&self.tokens) && prompt.len() > self.tokens.len()) {
            *self = Self { roles: std::mem::take(&mut self.roles), ..Self::new(model) };
        }
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        let (mut new, began) = (Vec::new(), Instant::now());
        let mut next: Vec<u32> = prompt[self.tokens.len()..].to_vec();
        while new.len() < sampling.max_new_tokens {
            let token = choose(&self.read(model, &next, prompt), sampling, &mut rng);
            if new.is_empty() {
                self.reading = began.elapsed();
            }
            if stops.contains(&token) {
                return (new, Some(token));
            }
            new.push(token);
            if on_token(token).is_break() {
                break;
            }
            next = vec![token];
        }
        (new, None)
    }
}

/// `[rows, vocab]`: the logits after `tokens`, `[rows, new]`, which continue what is cached.
fn next_logits(model: &Decoder, tokens: &[u32], context: Context<'_>, cache: &mut Cache) -> Vec<f32> {
    let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
    let (rows, mask, device) = (context.rows, Mask::causal(), model.device());
    let new = tokens.len() / rows;
    on_the_pool(&device, || {
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, new]), &device);
        let hidden = model.pass(ids, Pass { cache: Some(cache), context: Some(context), ..Pass::new(&mask) }).hidden;
        let last = hidden.narrow(1, new - 1, 1);
        model.logits(last).into_data().iter::<f32>().collect()
    })
}

/// The index of the next token.
fn choose(logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> u32 {
    // Ties go to the smaller id, so that the order never depends on the sort.
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let mut ranked: Vec<u32> = (0..logits.len() as u32).collect();
    let limit = match sampling {
        Sampling { temperature: 0.0, .. } => 1,
        Sampling { top_k: 0, .. } => usize::MAX,
        Sampling { top_k, .. } => *top_k,
    };
    if limit < ranked.len() {
        ranked.select_nth_unstable_by(limit - 1, order);
        ranked.truncate(limit);
    }
    ranked.sort_unstable_by(order);
    if sampling.temperature == 0.0 {
        return ranked[0];
    }
    let best = f64::from(logits[ranked[0] as usize]);
    let weight = |&id: &u32| ((f64::from(logits[id as usize]) - best) / sampling.temperature).exp();
    let weights: Vec<f64> = ranked.iter().map(weight).collect();
    let all: f64 = weights.iter().sum();
    let mut kept = 0.0;
    let enough = weights.iter().position(|w| {
        kept += w;
        kept >= sampling.top_p * all
    });
    let count = enough.map_or(weights.len(), |last| last + 1);
    let mut left = rng.random::<f64>() * weights[..count].iter().sum::<f64>();
    let chosen = weights[..count].iter().position(|w| {
        left -= w;
        left < 0.0
    });
    ranked[chosen.unwrap_or(count - 1)]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::DecoderConfig;

    fn model() -> Decoder {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#;
        let device = Device::flex();
        seed_random(5);
        serde_json::from_str::<DecoderConfig>(config).unwrap().init(9, &device)
    }

    #[test]
    fn many_rows_are_each_continued_as_one_alone() {
        let (model, prompts) = (model(), [vec![1, 2, 3], vec![4, 0, 8], vec![7, 7, 2]]);
        let greedy = Sampling { max_new_tokens: 12, temperature: 0.0, ..Sampling::default() };
        let alone = |prompt: &Vec<u32>| {
            Past::new(&model).generate(&model, prompt, &greedy, &[5, 6], |_| ControlFlow::Continue(())).0
        };
        let together = continuations(&model, &prompts, &greedy, &[5, 6], &|| true).unwrap();
        for (prompt, row) in prompts.iter().zip(&together) {
            assert_eq!(row.tokens, alone(prompt));
            assert_eq!(row.stop.is_some(), row.tokens.len() < 12);
        }
    }

    #[test]
    fn a_conversation_that_goes_on_reads_as_one_text() {
        let (model, greedy) = (model(), Sampling { max_new_tokens: 4, temperature: 0.0, ..Sampling::default() });
        let mut past = Past::new(&model);
        let go_on = |_| ControlFlow::Continue(());
        let mut text = vec![1, 2, 3];
        for turn in [vec![4, 4], vec![8], vec![0, 2, 7]] {
            let (answer, _) = past.generate(&model, &text, &greedy, &[], go_on);
            assert_eq!(answer, Past::new(&model).generate(&model, &text, &greedy, &[], go_on).0);
            // Its last token has been chosen, not read.
            assert_eq!(past.tokens, [&text[..], &answer[..3]].concat());
            text.extend([answer, turn].concat());
        }
        // Another text, and the same again: nothing is left of the one before.
        for text in [vec![5; 40], vec![5; 3], vec![5; 3]] {
            let fresh = Past::new(&model).generate(&model, &text, &greedy, &[], go_on).0;
            assert_eq!(past.generate(&model, &text, &greedy, &[], go_on).0, fresh);
            assert_eq!(past.tokens, [&text[..], &fresh[..3]].concat());
        }
    }

    #[test]
    fn what_is_drawn_depends_on_seed_and_place_only() {
        let (model, prompts) = (model(), vec![vec![1, 2]; ROWS + 3]);
        let sampling = Sampling { max_new_tokens: 6, temperature: 1.0, ..Sampling::default() };
        let all = continuations(&model, &prompts, &sampling, &[], &|| true).unwrap();
        assert_eq!(continuations(&model, &prompts, &sampling, &[], &|| false), None);
        let tokens = |rows: &[Continuation]| rows.iter().map(|row| row.tokens.clone()).collect::<Vec<_>>();
        let first = continuations(&model, &prompts[..3], &sampling, &[], &|| true).unwrap();
        assert_eq!(tokens(&first), tokens(&all[..3]));
        assert!(all.iter().any(|row| row.tokens != all[0].tokens));
        // Small fresh weights: all 9 ids are about equally likely.
        assert!(all.iter().all(|row| (row.entropy - 9f64.ln()).abs() < 0.1), "{}", all[0].entropy);
        assert!(all.iter().all(|row| (row.log_probability + 6.0 * 9f64.ln()).abs() < 2.0), "{:?}", all[0]);
    }

    fn draws(sampling: &Sampling) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let logits = [0.0, 2.0, 1.0, -1.0];
        (0..400).map(|_| choose(&logits, sampling, &mut rng)).collect()
    }

    #[test]
    fn limits_cut_the_unlikely() {
        let all = Sampling { temperature: 1.0, ..Sampling::default() };
        assert!((0..4).all(|id| draws(&all).contains(&id)));
        assert!(draws(&Sampling { top_k: 2, ..all.clone() }).iter().all(|&id| id == 1 || id == 2));
        // Probabilities are about 0.61 and 0.22 for the first two.
        assert!(draws(&Sampling { top_p: 0.5, ..all.clone() }).iter().all(|&id| id == 1));
        assert!(draws(&Sampling { top_p: 0.7, ..all.clone() }).iter().all(|&id| id == 1 || id == 2));
        assert!(draws(&Sampling { temperature: 0.0, ..all }).iter().all(|&id| id == 1));
    }
}
