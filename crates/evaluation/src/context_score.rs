//! How much answers depend on their context, by what heads of one layer give to it, and the word that says so
//! (arXiv 2411.02688; the authors' code is followed).
//!
//! ```text
//! s(answer) = mean over its tokens of the maximum over heads of Σ_{user tokens} A        above β: context-dependent
//! ```
//! The code against the text: a full stop is added below the threshold too; text of a system prompt counts as the user's; a header that
//! was cut off is not recognised, and counts as text.

use std::ops::Range;

use polyhead_kernels::comparison::largest;
pub use polyhead_models::marked_message;

/// The tokens of a template that say who speaks, and ids that are nobody's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    /// Before a system prompt.
    pub system: Vec<u32>,
    /// Before what the user says.
    pub user: Vec<u32>,
    /// Before what the assistant says.
    pub assistant: Vec<u32>,
    /// Ids that do not count as the user's text.
    pub special: Vec<u32>,
}

/// Whose the tokens of a conversation are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turns {
    /// Tokens of headers.
    pub template: Vec<bool>,
    /// What users say, a system prompt included.
    pub user: Vec<bool>,
    /// Of each answer, its tokens.
    pub responses: Vec<Vec<bool>>,
}

impl Headers {
    /// Finds the turns of a conversation, whose first `length` tokens are no padding.
    pub fn turns(&self, ids: &[u32], is_text: &[bool]) -> Turns {
        let places = |header: &[u32]| -> Vec<Range<usize>> {
            let starts = ids.windows(header.len().max(1)).enumerate().filter(|(_, window)| *window == header);
            starts.map(|(start, _)| start..start + header.len()).collect()
        };
        let [system, user, assistant] = [&self.system, &self.user, &self.assistant].map(|header| places(header));
        let headers = || system.iter().chain(&user).chain(&assistant);
        let template: Vec<bool> = (0..ids.len()).map(|at| headers().any(|header| header.contains(&at))).collect();
        let end_of = |start: usize| user.iter().map(|header| header.start).find(|&at| at >= start).unwrap_or(ids.len());
        let spans: Vec<Range<usize>> = assistant.iter().map(|header| header.end..end_of(header.end)).collect();
        let own = |at: usize| is_text[at] && !template[at];
        let responses: Vec<Vec<bool>> =
            spans.iter().map(|span| (0..ids.len()).map(|at| span.contains(&at) && own(at)).collect()).collect();
        let said = |at: usize| !spans.iter().any(|span| span.contains(&at));
        let user = (0..ids.len()).map(|at| own(at) && said(at) && !self.special.contains(&ids[at])).collect();
        Turns { template, user, responses }
    }
}

/// The score of each answer.
#[derive(Debug, Clone, PartialEq)]
pub struct ContextScores {
    /// Of each token, the largest share that a head gives to the user's tokens.
    pub tokens: Vec<f64>,
    /// Of each answer, the mean over its tokens; `None` where it has none.
    pub turns: Vec<Option<f64>>,
}

/// Scores answers by maps of one layer, `[heads][queries * keys]`.
pub fn context_scores(maps: &[Vec<f32>], turns: &Turns) -> ContextScores {
    let length = turns.user.len();
    let share = |map: &Vec<f32>, query: usize| -> f64 {
        let row = map[query * length..(query + 1) * length].iter().zip(&turns.user);
        row.filter(|(_, user)| **user).map(|(&weight, _)| f64::from(weight)).sum()
    };
    let of_token = |at: usize| largest(0.0, maps.iter().map(|map| share(map, at)));
    let tokens: Vec<f64> = (0..length).map(of_token).collect();
    let of_turn = |answer: &Vec<bool>| {
        let own: Vec<f64> = tokens.iter().zip(answer).filter(|(_, own)| **own).map(|(&score, _)| score).collect();
        (!own.is_empty()).then(|| own.iter().sum::<f64>() / own.len() as f64)
    };
    let turns = turns.responses.iter().map(of_turn).collect();
    ContextScores { tokens, turns }
}
