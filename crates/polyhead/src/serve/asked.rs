//! What a request asks for, checked: whatever is not known or cannot be done is refused by name.

use polyhead_data::Tokenizer;
use polyhead_models::Sampling;
use polyhead_models::intervention::{Context, Intervention};
use polyhead_recipe::StatedIntervention;
use polyhead_runs::answer::{Answer, Prompt};
use polyhead_runs::intervention::check_spans;
use polyhead_runs::{Failure, Trained};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// Why a request is refused, and by which of its keys.
#[derive(Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong, with the rule.
    pub problem: String,
    /// The key, where there is one.
    pub key: Option<String>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// One prompt or several.
    pub prompts: Vec<Prompt>,
    /// Continuations of each.
    pub n: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Strings before which an answer ends.
    pub until: Vec<String>,
    /// Whether the prompt is given back before the answer.
    pub echo: bool,
    /// So many of the likeliest tokens are given in each place, with the logarithms of their probabilities.
    pub logprobs: Option<usize>,
    /// Whether text is sent as it comes.
    pub stream: bool,
}

impl Asked {
    /// How many answers there will be.
    pub fn rows(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// Prompts and answers as one text each, with the token that ended it: whoever asks for the likelihood of a prompt and of
    /// one token more counts on that.
    pub fn texts(&self, answers: &[Answer]) -> Vec<Vec<u32>> {
        let of = |(at, Answer { tokens, stop, .. }): (usize, &Answer)| {
            [&self.prompts[at / self.n].ids[..], tokens, stop.as_slice()].concat()
        };
        answers.iter().enumerate().map(of).collect()
    }
}

/// Answers of one request at most; chosen by us.
pub const MOST: usize = 256;

/// The likeliest tokens in each place at most; chosen by us.
const MOST_LOGPROBS: usize = 100;

/// Tokens of an answer where nothing is said, as OpenAI's completions have it.
const TOKENS: usize = 16;

/// One or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn all(self) -> Vec<T> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

/// A prompt, or several: each a text or its tokens.
#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    Texts(OneOrMany<String>),
    Tokens(OneOrMany<Vec<u32>>),
}

/// The keys of a request that have not been read yet.
struct Keys(Map<String, Value>);

impl Keys {
    fn of(body: &[u8]) -> Result<Self, Refused> {
        let refused = |problem: String| Refused { problem, key: None };
        match serde_json::from_slice(body) {
            Ok(Value::Object(keys)) => Ok(Self(keys)),
            Ok(_) => Err(refused("the request must be a JSON object".into())),
            Err(error) => Err(refused(format!("invalid JSON: {error}"))),
        }
    }

    /// A key, if it is there and not null. `rule` is what it must be, in words.
    fn take<T: DeserializeOwned>(&mut self, key: &str, rule: &str) -> Result<Option<T>, Refused> {
        let Some(value) = self.0.shift_remove(key).filter(|value| !value.is_null()) else { return Ok(None) };
        let read = serde_json::from_value(value.clone());
        read.map(Some).map_err(|_| refuse(key, &format!("{key} ({}) must be {rule}", shortened(&value))))
    }

    /// A key that may only have the value that changes nothing.
    fn neutral(&mut self, key: &str, only: &Value) -> Result<(), Refused> {
        let Some(value) = self.0.shift_remove(key) else { return Ok(()) };
        let same_number = value.as_f64().is_some_and(|value| only.as_f64() == Some(value));
        match value.is_null() || value == *only || same_number {
            true => Ok(()),
            false => {
                let value = shortened(&value);
                Err(refuse(key, &format!("{key} ({value}) is not supported: leave it out, or set {only}")))
            }
        }
    }

    /// Refuses what nobody has read.
    fn finish(self) -> Result<(), Refused> {
        match self.0.keys().next() {
            Some(key) => Err(refuse(key, &format!("{key} is not known here"))),
            None => Ok(()),
        }
    }
}

fn refuse(key: &str, problem: &str) -> Refused {
    Refused { problem: problem.to_owned(), key: Some(key.to_owned()) }
}

fn shortened(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { text.chars().take(60).chain("...".chars()).collect() } else { text }
}

/// What has to be known of a model to check what it is asked for.
pub struct Model {
    /// How it reads text.
    pub tokenizer: Tokenizer,
    ends: Vec<u32>,
    vocab_size: usize,
    longest: usize,
    /// What is changed in every forward, and how it was written.
    intervention: Option<(Intervention, Option<StatedIntervention>)>,
}

impl Model {
    /// What there is to know about a model.
    ///
    /// # Errors
    /// If it has no tokenizer.
    pub fn of(trained: &Trained) -> Result<Self, Failure> {
        Ok(Self {
            tokenizer: trained.text_tokenizer()?.clone(),
            ends: trained.ends.clone(),
            vocab_size: trained.model.vocab_size(),
            longest: trained.max_positions,
            intervention: trained.model.intervention().map(|own| (own.clone(), trained.intervention.clone())),
        })
    }

    /// A request to `/v1/completions`. `number` seeds what says nothing about a seed.
    pub fn completion(&self, body: &[u8], number: u64) -> Result<Asked, Refused> {
        let mut keys = Keys::of(body)?;
        let rule = "a text, a list of texts, a list of tokens, or a list of such lists";
        let prompts: Prompts =
            keys.take("prompt", rule)?.ok_or_else(|| refuse("prompt", "prompt is missing: what is to be continued"))?;
        let of_text = |text: String| Prompt::plain(&self.tokenizer, &text).map_err(|error| said("prompt", &error));
        let prompts = match prompts {
            Prompts::Texts(texts) => texts.all().into_iter().map(of_text).collect::<Result<Vec<_>, _>>()?,
            Prompts::Tokens(lists) => {
                lists.all().into_iter().map(|ids| self.of_tokens(ids)).collect::<Result<_, _>>()?
            }
        };
        let echo = keys.take("echo", "true or false")?.unwrap_or(false);
        let logprobs = keys.take("logprobs", "a number of tokens")?;
        keys.neutral("best_of", &json!(1))?;
        keys.neutral("suffix", &json!(""))?;
        self.asked(keys, prompts, (echo, logprobs, Some(TOKENS)), number)
    }

    /// A request to `/v1/chat/completions`.
    pub fn chat(&self, body: &[u8], number: u64) -> Result<Asked, Refused> {
        let mut keys = Keys::of(body)?;
        let messages: Vec<Value> = keys
            .take("messages", "a list of objects with role and content")?
            .ok_or_else(|| refuse("messages", "messages is missing: what is to be answered"))?;
        let spoken = |message: &Value| message["role"].is_string() && message["content"].is_string();
        if messages.is_empty() || !messages.iter().all(spoken) {
            return Err(refuse("messages", "messages must be objects with role and content, both texts, at least one"));
        }
        let prompt = Prompt::chat(&self.tokenizer, &messages).map_err(|error| said("messages", &error))?;
        // The newer name of the same.
        if let Some(most) = keys.0.shift_remove("max_completion_tokens") {
            keys.0.entry("max_tokens").or_insert(most);
        }
        for (key, only) in [("logprobs", json!(false)), ("top_logprobs", json!(0)), ("tools", json!([]))] {
            keys.neutral(key, &only)?;
        }
        keys.neutral("response_format", &json!({ "type": "text" }))?;
        self.asked(keys, vec![prompt], (false, None, None), number)
    }

    /// The rest of a request: what both kinds have. Without `tokens`, an answer may fill all that the model was made for.
    fn asked(
        &self,
        mut keys: Keys,
        prompts: Vec<Prompt>,
        (echo, logprobs, tokens): (bool, Option<usize>, Option<usize>),
        number: u64,
    ) -> Result<Asked, Refused> {
        let prompts: Vec<Prompt> = prompts.into_iter().map(|prompt| prompt.ending_at(&self.ends)).collect();
        let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
        let most = self.longest;
        let Some(left) = most.checked_sub(longest) else {
            let problem = format!("the prompt has {longest} tokens, and the model was made for {most}");
            return Err(refuse("prompt", &problem));
        };
        let max_new_tokens = match keys.take("max_tokens", "a number of tokens")? {
            Some(new) if new > left => {
                let whole = format!("max_tokens ({new}) with a prompt of {longest} tokens");
                return Err(refuse(
                    "max_tokens",
                    &format!("{whole} is more than the {most} that the model was made for"),
                ));
            }
            given => given.unwrap_or(tokens.map_or(left, |default| left.min(default))),
        };
        prompts.iter().try_for_each(|prompt| self.check_spans(prompt, max_new_tokens))?;
        let temperature = keys.take("temperature", "a number, 0 or more")?.unwrap_or(1.0);
        let top_p = keys.take("top_p", "a number above 0, up to 1")?.unwrap_or(1.0);
        let n: usize = keys.take("n", "a number of answers")?.unwrap_or(1);
        let answers = n.saturating_mul(prompts.len());
        let rules = [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 to 100"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0, up to 1"),
            (
                "logprobs",
                logprobs.unwrap_or(0) as f64,
                logprobs.is_none_or(|best| best <= MOST_LOGPROBS),
                "at most 100",
            ),
            ("prompt", prompts.len() as f64, (1..=MOST).contains(&prompts.len()), "1 to 256 prompts"),
            ("n", n as f64, (1..=MOST).contains(&answers), "1 or more, up to 256 answers to all prompts"),
        ];
        if let Some((key, value, _, rule)) = rules.into_iter().find(|(_, _, holds, _)| !holds) {
            return Err(refuse(key, &format!("{key} ({value}) must be {rule}")));
        }
        let asked = Asked {
            n,
            sampling: Sampling {
                max_new_tokens,
                temperature,
                top_k: keys.take("top_k", "a number of tokens")?.unwrap_or(0),
                top_p,
                seed: keys.take("seed", "a whole number, 0 or more")?.unwrap_or(number),
                ..Sampling::default()
            },
            until: keys.take("stop", "a text or a list of texts")?.map(OneOrMany::all).unwrap_or_default(),
            stream: keys.take("stream", "true or false")?.unwrap_or(false),
            prompts,
            echo,
            logprobs,
        };
        // Which model is asked is decided by the address; who asks changes nothing.
        for key in ["model", "user"] {
            keys.take::<String>(key, "a text")?;
        }
        for key in ["presence_penalty", "frequency_penalty"] {
            keys.neutral(key, &json!(0))?;
        }
        keys.neutral("logit_bias", &json!({}))?;
        keys.finish()?;
        if asked.stream && (asked.rows() > 1 || asked.logprobs.is_some() || asked.echo) {
            return Err(refuse("stream", "stream takes one prompt and one answer, without echo and logprobs"));
        }
        Ok(asked)
    }

    /// Refuses a prompt in which the model's intervention finds none of what it is to change.
    fn check_spans(&self, Prompt { ids, roles, .. }: &Prompt, max_new_tokens: usize) -> Result<(), Refused> {
        let Some((own, stated)) = &self.intervention else { return Ok(()) };
        let context = Context { rows: 1, tokens: ids, roles, prompt: ids.len(), ..Context::default() };
        check_spans(Some(own), stated.as_ref(), &context, ids.len().saturating_add(max_new_tokens))
            .map_err(|error| said("prompt", &error))
    }

    fn of_tokens(&self, ids: Vec<u32>) -> Result<Prompt, Refused> {
        let vocab = self.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(refuse("prompt", &format!("prompt: token {id} is not below the vocabulary ({vocab})"))),
            None if ids.is_empty() => Err(refuse("prompt", "prompt is an empty list of tokens")),
            None => Ok(Prompt { ids, stops: self.tokenizer.end_of_text().into_iter().collect(), roles: Vec::new() }),
        }
    }
}

fn said(key: &str, error: &Failure) -> Refused {
    refuse(key, error.to_string().trim_start_matches("error: "))
}
