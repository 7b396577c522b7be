//! `[[setting]]`: a dial that every arm is trained at, as a rate of noise or a length of text; the rungs of a ladder are settings
//! too.
//!
//! Arms are multiplied when the file is read, so that all that follows knows plain arms: those of the first setting come
//! first, each named `ARM; SETTING`. Differences are taken within a setting.

use std::ops::Range;

use super::ladder::{self, Ladder};
use super::{Arm, Claim, Comparison};

/// The place of an arm in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// The number of its `[[arm]]`.
    pub arm: usize,
    /// The number of its setting, where there are some: of a `[[setting]]`, or of a rung of the ladder.
    pub setting: Option<usize>,
    /// The number of its `[[ladder.size]]`, where there are some.
    pub size: Option<usize>,
}

/// Every arm at every setting, every claim at those that it is about.
pub fn multiplied(mut comparison: Comparison) -> Comparison {
    for (at, arm) in comparison.arm.iter_mut().enumerate() {
        arm.place = Place { arm: at, ..Place::default() };
    }
    comparison.setting = ladder::settings(&comparison);
    let rungs = comparison.ladder.as_ref().map_or(Vec::new(), Ladder::rungs);
    let names: Vec<String> = comparison.setting.iter().map(|setting| setting.name.clone()).collect();
    let Some(first) = names.first() else { return comparison };
    let settings = || names.iter().enumerate();
    let sizes: Vec<usize> = rungs.iter().map(|rung| rung.size).collect();
    let sizes = &sizes;
    comparison.base = comparison.base.map(|base| at_setting(&base, first));
    comparison.arm = settings()
        .flat_map(|(at, setting)| {
            comparison.arm.iter().map(move |arm| Arm {
                name: at_setting(&arm.name, setting),
                place: Place { setting: Some(at), size: sizes.get(at).copied(), ..arm.place },
                ..arm.clone()
            })
        })
        .collect();
    comparison.claim = comparison
        .claim
        .iter()
        .flat_map(|claim| {
            let asked = settings().filter(|(_, name)| claim.setting.as_ref().is_none_or(|asked| asked == *name));
            asked.map(|(_, setting)| Claim {
                claim: at_setting(&claim.claim, setting),
                arms: claim.arms.iter().map(|arm| at_setting(arm, setting)).collect(),
                ..claim.clone()
            })
        })
        .collect();
    comparison
}

fn at_setting(name: &str, setting: &str) -> String {
    format!("{name}; {setting}")
}

impl Comparison {
    /// The arms of each setting, with its name; all arms without one where there are none.
    pub fn groups(&self) -> Vec<(Option<&str>, Range<usize>)> {
        let size = self.arm.len() / self.setting.len().max(1);
        let names = self.setting.iter().map(|setting| Some(setting.name.as_str()));
        let groups = names.enumerate().map(|(at, name)| (name, at * size..(at + 1) * size));
        if self.setting.is_empty() { vec![(None, 0..size)] } else { groups.collect() }
    }

    /// The arm that this one is compared with: the base arm at the same setting.
    pub fn base_of(&self, arm: usize) -> usize {
        let base = self.base.as_ref().and_then(|name| self.arm.iter().position(|arm| arm.name == *name)).unwrap_or(0);
        let size = self.arm.len() / self.setting.len().max(1);
        arm / size * size + base
    }

    /// An arm's name without its setting.
    pub fn plain_name(&self, arm: usize) -> &str {
        let Arm { name, place, .. } = &self.arm[arm];
        let setting = place.setting.map(|at| format!("; {}", self.setting[at].name));
        setting.and_then(|setting| name.strip_suffix(&setting)).unwrap_or(name)
    }

    /// What differences are to, in words.
    pub fn base_in_words(&self) -> String {
        let name = self.plain_name(self.base_of(0));
        if self.setting.is_empty() { name.to_owned() } else { format!("{name} at the same setting") }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn arms_stand_at_every_setting_beside_their_base() {
        let comparison: Comparison = toml::from_str(
            "seeds = [0]\nbase = \"b\"\n[[setting]]\nname = \"low\"\n[[setting]]\nname = \"high\"\n[[arm]]\nname = \"a\"\n\
             [[arm]]\nname = \"b\"\n[[claim]]\nclaim = \"x\"\npaper = \"y\"\narms = [\"a\", \"b\"]\nsetting = \"high\"\n\
             [[claim]]\nclaim = \"z\"\npaper = \"y\"\narms = [\"a\", \"b\"]",
        )
        .unwrap();
        let comparison = multiplied(comparison);
        let names: Vec<&str> = comparison.arm.iter().map(|arm| arm.name.as_str()).collect();
        assert_eq!(names, ["a; low", "b; low", "a; high", "b; high"]);
        assert_eq!((0..4).map(|arm| comparison.base_of(arm)).collect::<Vec<_>>(), [1, 1, 3, 3]);
        assert_eq!(comparison.plain_name(2), "a");
        assert_eq!(comparison.groups(), [(Some("low"), 0..2), (Some("high"), 2..4)]);
        let claims: Vec<(&str, &str)> =
            comparison.claim.iter().map(|claim| (claim.claim.as_str(), claim.arms[0].as_str())).collect();
        assert_eq!(claims, [("x; high", "a; high"), ("z; low", "a; low"), ("z; high", "a; high")]);
    }
}
