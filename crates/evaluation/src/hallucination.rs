//! What a model answers to questions whose truth is known: how often it is right, how often it is wrong and sure of it,
//! how far it agrees with itself, and whether EigenScore and EES tell the wrong answers from the right ones.

use polyhead_models::{Continuation, Decoder, Known, Question, Sampling, continuations};
use serde::Serialize;

use crate::ees::EesConfig;
use crate::eigenscore::{EigenScore, matrix};
use crate::sensitivity::Embedding;
use crate::texts::Texts;

/// How questions are asked.
#[derive(Debug, Clone)]
pub struct Asking {
    /// Answers drawn for each question besides the likeliest one. EigenScore's: 10.
    pub samples: usize,
    /// A wrong answer to which the model gives at least this probability counts as confident. Default: 0.5.
    pub confident: f64,
    /// How answers are drawn.
    pub sampling: Sampling,
    /// The token that ends an answer.
    pub end: u32,
    /// The layer whose output EigenScore and EES look at, from 0.
    pub layer: usize,
    /// How EES is computed.
    pub ees: EesConfig,
}

impl Asking {
    /// As published: 10 answers, the last but one layer.
    pub fn new(end: u32, n_layers: usize) -> Self {
        Self {
            samples: 10,
            confident: 0.5,
            sampling: Sampling { max_new_tokens: 8, ..Sampling::eigenscore() },
            end,
            layer: n_layers.saturating_sub(2),
            ees: EesConfig::default(),
        }
    }
}

/// What came of one question.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// Whether it could be known.
    pub known: Known,
    /// Whether the likeliest answer is the true one.
    pub right: bool,
    /// Probability of the likeliest answer.
    pub probability: f64,
    /// Mean entropy of its tokens, in nats.
    pub entropy: f64,
    /// Share of pairs of drawn answers that agree.
    pub consistency: f64,
    /// EigenScore (INSIDE's paper) of the drawn answers.
    pub eigenscore: f64,
    /// EES of the drawn answers.
    pub ees: f64,
}

/// Asks all questions, which are equally long; `None` once `go_on` says no. Call it on `model.valid()`.
pub fn ask(model: &Decoder, questions: &[Question], asking: &Asking, go_on: &dyn Fn() -> bool) -> Option<Vec<Judged>> {
    let prompts: Vec<Vec<u32>> = questions.iter().map(|question| question.prompt.clone()).collect();
    let greedy = Sampling { temperature: 0.0, ..asking.sampling.clone() };
    let likeliest = continuations(model, &prompts, &greedy, &[asking.end], go_on)?;
    let many: Vec<Vec<u32>> =
        prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), asking.samples.max(1))).collect();
    let drawn = continuations(model, &many, &asking.sampling, &[asking.end], go_on)?;
    let whole = many.iter().zip(&drawn).map(|(prompt, answer)| [&prompt[..], &answer.tokens].concat());
    let rows = Texts::plain(whole).embeddings(model, asking.layer, Embedding::Last);
    let samples = asking.samples.max(1);
    let judge = |(index, question): (usize, &Question)| {
        let (answer, own) = (&likeliest[index], index * samples..(index + 1) * samples);
        let rows = matrix(&rows[own.clone()]);
        Judged {
            known: question.known,
            right: answer.stop.is_some() && answer.tokens == question.answer,
            probability: answer.log_probability.exp(),
            entropy: answer.entropy,
            consistency: consistency(&drawn[own]),
            eigenscore: EigenScore::Inside.of(&rows),
            ees: asking.ees.of(&rows.transpose(), asking.sampling.seed),
        }
    };
    Some(questions.iter().enumerate().map(judge).collect())
}

fn consistency(answers: &[Continuation]) -> f64 {
    let pairs = answers.len() * answers.len().saturating_sub(1) / 2;
    let same = |(index, answer): (usize, &Continuation)| {
        answers[..index].iter().filter(|other| other.tokens == answer.tokens).count()
    };
    answers.iter().enumerate().map(same).sum::<usize>() as f64 / pairs.max(1) as f64
}

/// Shares and means over all questions; where there is none of a kind, null.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Share of right answers to what was taught in these words.
    pub exact_match_taught: Option<f64>,
    /// To what was taught in other words.
    pub exact_match_paraphrased: Option<f64>,
    /// To what is to be forgotten.
    pub exact_match_forgotten: Option<f64>,
    /// Share of answers to what is to be forgotten that are wrong and sure.
    pub confident_wrong_forgotten: Option<f64>,
    /// Share of answers to what was never taught that are wrong and sure.
    pub confident_wrong_untaught: Option<f64>,
    /// The same over all questions.
    pub confident_wrong: Option<f64>,
    /// Share of wrong answers to all questions: the rate of hallucination.
    pub wrong: Option<f64>,
    /// Mean agreement of drawn answers: taught.
    pub consistency_taught: Option<f64>,
    /// Untaught.
    pub consistency_untaught: Option<f64>,
    /// Mean entropy of tokens, nats: taught.
    pub entropy_taught: Option<f64>,
    /// Untaught.
    pub entropy_untaught: Option<f64>,
    /// Mean EES over all questions.
    pub ees: Option<f64>,
    /// Mean EigenScore over all questions.
    pub eigenscore: Option<f64>,
    /// How well EES tells wrong answers from right ones: 0.5 is chance, 1 perfect.
    pub auroc_ees: Option<f64>,
    /// The same of EigenScore.
    pub auroc_eigenscore: Option<f64>,
    /// The same of the entropy of tokens.
    pub auroc_entropy: Option<f64>,
}

impl Summary {
    /// Of what came of all questions.
    pub fn of(judged: &[Judged], confident: f64) -> Self {
        let mean = |of: &dyn Fn(&Judged) -> bool, value: &dyn Fn(&Judged) -> f64| {
            let values: Vec<f64> = judged.iter().filter(|one| of(one)).map(value).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let all = |_: &Judged| true;
        let kind = |known: Known| move |one: &Judged| one.known == known;
        let share = |holds: bool| f64::from(u8::from(holds));
        let right = |one: &Judged| share(one.right);
        let sure = |one: &Judged| share(!one.right && one.probability >= confident);
        let scored = |score: &dyn Fn(&Judged) -> f64| {
            auroc(&judged.iter().map(|one| (score(one), !one.right)).collect::<Vec<_>>())
        };
        Self {
            exact_match_taught: mean(&kind(Known::Taught), &right),
            exact_match_paraphrased: mean(&kind(Known::Paraphrased), &right),
            exact_match_forgotten: mean(&kind(Known::Forgotten), &right),
            confident_wrong_forgotten: mean(&kind(Known::Forgotten), &sure),
            confident_wrong_untaught: mean(&kind(Known::Untaught), &sure),
            confident_wrong: mean(&all, &sure),
            wrong: mean(&all, &|one| share(!one.right)),
            consistency_taught: mean(&kind(Known::Taught), &|one| one.consistency),
            consistency_untaught: mean(&kind(Known::Untaught), &|one| one.consistency),
            entropy_taught: mean(&kind(Known::Taught), &|one| one.entropy),
            entropy_untaught: mean(&kind(Known::Untaught), &|one| one.entropy),
            ees: mean(&all, &|one| one.ees),
            eigenscore: mean(&all, &|one| one.eigenscore),
            auroc_ees: scored(&|one| one.ees),
            auroc_eigenscore: scored(&|one| one.eigenscore),
            auroc_entropy: scored(&|one| one.entropy),
        }
    }

    /// By name, those that there are.
    pub fn numbers(&self) -> Vec<(String, f64)> {
        let table = serde_json::to_value(self).unwrap_or_default();
        let entries = table.as_object().into_iter().flatten();
        entries.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect()
    }
}

/// The probability that a positive has a higher score than a negative, ties counting half (Mann and Whitney 1947); `None`
/// where one of them is missing.
pub fn auroc(scored: &[(f64, bool)]) -> Option<f64> {
    let mut order: Vec<&(f64, bool)> = scored.iter().collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let positives = order.iter().filter(|(_, positive)| *positive).count();
    let negatives = order.len() - positives;
    if positives == 0 || negatives == 0 {
        return None;
    }
    let (mut ranks, mut at) = (0.0, 0);
    while at < order.len() {
        let tied = order[at..].iter().take_while(|(score, _)| *score == order[at].0).count();
        // Ranks from 1; what is tied shares the mean of its ranks.
        let rank = at as f64 + (tied as f64 + 1.0) / 2.0;
        ranks += rank * order[at..at + tied].iter().filter(|(_, positive)| *positive).count() as f64;
        at += tied;
    }
    let (positives, negatives) = (positives as f64, negatives as f64);
    Some((ranks - positives * (positives + 1.0) / 2.0) / (positives * negatives))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auroc_counts_pairs() {
        let scored = [(0.1, false), (0.4, true), (0.35, false), (0.8, true), (0.35, true)];
        // Pairs: 0.4 > both, 0.8 > both, 0.35 > 0.1 and ties with 0.35.
        assert_eq!(auroc(&scored), Some(5.5 / 6.0));
        assert_eq!(auroc(&[(1.0, true), (2.0, true)]), None);
        assert_eq!(auroc(&[(1.0, true), (1.0, false)]), Some(0.5));
    }

    #[test]
    fn shares_are_of_their_kind() {
        let judged = |known, right, probability| Judged {
            known,
            right,
            probability,
            entropy: 0.5,
            consistency: 1.0,
            eigenscore: 0.0,
            ees: if right { -2.0 } else { -1.0 },
        };
        let all = [
            judged(Known::Taught, true, 0.9),
            judged(Known::Taught, false, 0.3),
            judged(Known::Untaught, false, 0.9),
            judged(Known::Untaught, false, 0.2),
        ];
        let summary = Summary::of(&all, 0.5);
        assert_eq!(summary.exact_match_taught, Some(0.5));
        assert_eq!(summary.exact_match_paraphrased, None);
        assert_eq!(summary.confident_wrong_untaught, Some(0.5));
        assert_eq!((summary.confident_wrong, summary.wrong), (Some(0.25), Some(0.75)));
        assert_eq!((summary.auroc_ees, summary.auroc_entropy), (Some(1.0), Some(0.5)));
        assert_eq!(summary.numbers().len(), 13);
    }
}
