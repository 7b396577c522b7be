//! Whether classes are classes: at least two that occur, fewer than there are examples, with names that can be told apart.

use std::collections::BTreeMap;

use crate::DataError;

/// From so many examples on it is no accident that each has a class of its own.
const ENOUGH: usize = 20;
/// Class names that a message holds at most.
const SHOWN: usize = 5;

/// The classes of a set.
pub(super) struct Classes<'a> {
    /// Their names.
    pub(super) names: &'a [String],
    /// The table of the recipe: "csv_images".
    pub(super) data: &'static str,
    /// The key that says where classes stand, where there is one.
    pub(super) field: Option<&'static str>,
}

impl Classes<'_> {
    /// Checks which classes occur, and gives what there is to tell about them.
    ///
    /// # Errors
    /// If fewer than two occur, or what should be a class is another one for each example.
    pub(super) fn check(&self, labels: impl Iterator<Item = u32>) -> Result<Vec<String>, DataError> {
        let (mut counts, mut all) = (vec![0usize; self.names.len()], 0);
        for label in labels {
            counts[label as usize] += 1;
            all += 1;
        }
        let found: Vec<&str> =
            self.names.iter().zip(&counts).filter(|(_, count)| **count > 0).map(|(name, _)| name.as_str()).collect();
        let way_out = self.field.map_or(String::new(), |field| format!(" (data.{}.{field} says where)", self.data));
        let unusable = |problem: String| Err(unusable!("data.{}: {problem}", self.data));
        let mut notes = Vec::new();
        match found.len() {
            0 | 1 => {
                let found = shown(&found);
                return unusable(format!("all {all} examples have one class ({found}): two are needed{way_out}"));
            }
            several if several == all && all >= ENOUGH && self.field.is_some() => {
                return unusable(format!(
                    "each of {all} examples has a class of its own ({}): that names examples, not classes{way_out}",
                    shown(&found)
                ));
            }
            several if 2 * several > all => notes
                .push(format!("{several} classes for {all} examples ({}): are these classes?{way_out}", shown(&found))),
            _ => {}
        }
        if found.len() < self.names.len() && found.len() * 2 <= self.names.len() {
            notes.push(format!(
                "of {} classes only {} occur ({}){way_out}",
                self.names.len(),
                found.len(),
                shown(&found)
            ));
        }
        notes.extend(self.alike());
        Ok(notes)
    }

    /// Names that look the same, or like nothing.
    fn alike(&self) -> Option<String> {
        let mut trimmed: BTreeMap<&str, Vec<&String>> = BTreeMap::new();
        for name in self.names {
            trimmed.entry(name.trim()).or_default().push(name);
        }
        let odd: Vec<&String> = trimmed
            .into_iter()
            .filter(|(name, all)| name.is_empty() || all.len() > 1)
            .flat_map(|(_, all)| all)
            .collect();
        (!odd.is_empty()).then(|| {
            format!(
                "{} classes have names that are empty or differ only in spaces ({}): each counts as a class of its own",
                odd.len(),
                shown(&odd.iter().map(|name| name.as_str()).collect::<Vec<_>>())
            )
        })
    }
}

fn shown(names: &[&str]) -> String {
    let first: Vec<String> = names.iter().take(SHOWN).map(|name| format!("{name:?}")).collect();
    format!("{}{}", first.join(", "), if names.len() > SHOWN { ", ..." } else { "" })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn check(names: &[&str], labels: &[u32]) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let classes = Classes { names: &names, data: "labelled_text", field: Some("label_field") };
        classes.check(labels.iter().copied()).map_err(|error| error.to_string())
    }

    #[test]
    fn classes_must_be_classes() {
        assert_eq!(check(&["a", "b"], &[0, 1, 1, 0]).unwrap(), Vec::<String>::new());
        let one = check(&["0", "1"], &[1, 1, 1]).unwrap_err();
        assert!(one.contains("all 3 examples have one class (\"1\")") && one.contains("label_field"), "{one}");
        let names: Vec<String> = (0..30).map(|i| format!("id {i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let each = check(&names, &(0..30).collect::<Vec<_>>()).unwrap_err();
        assert!(each.contains("each of 30 examples has a class of its own (\"id 0\""), "{each}");
        assert!(check(&["a", "b"], &[0, 1]).unwrap()[0].contains("2 classes for 2 examples"), "few: only a note");
        let sparse = check(&names, &[0, 9, 9, 0, 9]).unwrap();
        assert!(sparse[0].contains("of 30 classes only 2 occur"), "{sparse:?}");
        let alike = check(&["", "cat", "cat ", "dog"], &[0, 1, 2, 3, 3, 3, 3, 3]).unwrap();
        assert!(alike[0].contains("3 classes have names") && alike[0].contains("\"cat \""), "{alike:?}");
    }
}
