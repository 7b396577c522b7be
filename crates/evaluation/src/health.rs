//! How healthy a model of posts is, after arXiv 2510.13928: whether it still looks values up, copies and adds, and how long and how
//! repetitive its own posts are.

use std::collections::{BTreeMap, BTreeSet};

use polyhead_models::{Decoder, Sampling, SkillQuestion, continuations};

use crate::answers::is_right;

/// Posts that are written, their most tokens, and the length of what counts as repeated; chosen by us.
const POSTS: usize = 8;
const LONGEST: usize = 64;
const GRAM: usize = 4;

/// Questions, and the token that ends a post, which begins the next one.
pub struct Health {
    /// The questions.
    pub questions: Vec<SkillQuestion>,
    /// The end of a post; without one, no posts are written.
    pub end: Option<u32>,
}

impl Health {
    /// The share of right answers for each skill; the mean length of posts that the model writes, in tokens; and the share of
    /// runs of four tokens in them that the post has had before. `None` once `go_on` says no. Call it on `model.valid()`.
    pub fn measure(&self, model: &Decoder, go_on: &dyn Fn() -> bool) -> Option<Vec<(String, f64)>> {
        let mut right: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for SkillQuestion { skill, tokens, answer } in &self.questions {
            if !go_on() {
                return None;
            }
            let answered = is_right(model, tokens, &(*answer..tokens.len()), &[]);
            right.entry(skill).or_default().push(f64::from(u8::from(answered)));
        }
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let mut numbers: Vec<(String, f64)> =
            right.iter().map(|(skill, answers)| (format!("health/{skill}"), mean(answers))).collect();
        if let Some(end) = self.end {
            let sampling = Sampling { max_new_tokens: LONGEST, temperature: 1.0, ..Sampling::default() };
            let posts = continuations(model, &vec![vec![end]; POSTS], &sampling, &[end], go_on)?;
            let repeated: Vec<f64> = posts.iter().filter_map(|post| repeated(&post.tokens)).collect();
            let lengths: Vec<f64> = posts.iter().map(|post| post.tokens.len() as f64).collect();
            numbers.push(("health/response_length".into(), mean(&lengths)));
            numbers.push(("health/repetition".into(), mean(&repeated)));
        }
        Some(numbers)
    }
}

/// The share of runs of four tokens that came before; `None` where there are no such runs.
fn repeated(tokens: &[u32]) -> Option<f64> {
    let all = tokens.windows(GRAM).count();
    let different = tokens.windows(GRAM).collect::<BTreeSet<_>>().len();
    (all > 0).then(|| (all - different) as f64 / all as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_models::DecoderConfig;

    use super::*;

    #[test]
    fn runs_of_four_that_come_again_are_counted() {
        assert_eq!(repeated(&[1, 2, 3]), None);
        assert_eq!(repeated(&[1, 2, 3, 4, 5]), Some(0.0));
        assert_eq!(repeated(&[7; 8]), Some(0.8));
    }

    #[test]
    fn every_skill_and_the_models_own_posts_are_measured() {
        let config: DecoderConfig = serde_json::from_value(serde_json::json!({
            "d_model": 8, "n_layers": 1, "attention": { "softmax": { "n_heads": 2 } }
        }))
        .unwrap();
        let model = config.init(9, &Device::flex());
        // What the model writes after a token is what it is asked for, once.
        let next = continuations(
            &model,
            &[vec![3]],
            &Sampling { max_new_tokens: 1, temperature: 0.0, ..Sampling::default() },
            &[],
            &|| true,
        )
        .unwrap()[0]
            .tokens[0];
        let question = |skill, answer| SkillQuestion { skill, tokens: vec![3, answer], answer: 1 };
        let health = Health {
            questions: vec![question("copy", next), question("copy", (next + 1) % 9), question("arithmetic", next)],
            end: Some(8),
        };
        let told = health.measure(&model, &|| true).unwrap();
        let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["health/arithmetic", "health/copy", "health/response_length", "health/repetition"]);
        assert_eq!((told[0].1, told[1].1), (1.0, 0.5));
        assert!((0.0..=64.0).contains(&told[2].1) && (0.0..=1.0).contains(&told[3].1));
        assert!(health.measure(&model, &|| false).is_none());
    }
}
