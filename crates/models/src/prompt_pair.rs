//! Two prompts that differ in what matters, with the tokens that tell them apart, as token ids.

/// A prompt, the same with something else in it, and two tokens that may follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptPair {
    /// The prompt after which `right` is right.
    pub clean: Vec<u32>,
    /// The prompt in which what matters is another.
    pub corrupt: Vec<u32>,
    /// The token that is right after the clean prompt.
    pub right: u32,
    /// The token that is not.
    pub wrong: u32,
}

impl PromptPair {
    /// Refuses a pair whose runs cannot be compared, position by position, in a vocabulary of so many ids.
    ///
    /// # Errors
    /// Says the values, the rule and the way out.
    pub fn check(&self, vocab: usize) -> Result<(), String> {
        let [clean, corrupt] = [self.clean.len(), self.corrupt.len()];
        if clean != corrupt {
            return Err(format!(
                "its clean prompt has {clean} tokens and its corrupt one {corrupt}: they must be of one length; choose words of \
                 as many tokens"
            ));
        }
        if clean == 0 {
            return Err("its prompts have no tokens: give longer ones".into());
        }
        if self.clean == self.corrupt {
            return Err("its clean and its corrupt prompt are the same: change what the answer depends on".into());
        }
        if self.right == self.wrong {
            return Err(format!(
                "its right and its wrong answer begin with the same token ({}): give answers whose first tokens differ",
                self.right
            ));
        }
        let all = self.clean.iter().chain(&self.corrupt).chain([&self.right, &self.wrong]);
        match all.into_iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(format!("id {id} is not below the vocabulary ({vocab})")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_that_cannot_be_compared_are_refused() {
        let good = PromptPair { clean: vec![1, 2], corrupt: vec![1, 3], right: 4, wrong: 5 };
        assert_eq!(good.check(6), Ok(()));
        for (pair, words) in [
            (PromptPair { corrupt: vec![1], ..good.clone() }, "has 2 tokens and its corrupt one 1"),
            (PromptPair { clean: vec![], corrupt: vec![], ..good.clone() }, "no tokens"),
            (PromptPair { corrupt: vec![1, 2], ..good.clone() }, "are the same"),
            (PromptPair { wrong: 4, ..good.clone() }, "the same token (4)"),
            (PromptPair { wrong: 6, ..good.clone() }, "id 6 is not below the vocabulary (6)"),
        ] {
            assert!(pair.check(6).is_err_and(|problem| problem.contains(words)), "{pair:?}");
        }
    }
}
