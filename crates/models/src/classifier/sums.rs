//! What an evaluation of a classifier adds up: loss, confusions, how far its confidence can be trusted.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use polyhead_attention::{GateMean, Importance};
use serde::{Deserialize, Serialize};

use crate::{EvalTotals, Evaluated, Matrix};

/// Bins of confidence, as in Guo et al. (2017, arXiv 1706.04599).
const BINS: usize = 15;
/// With more classes than this, confusions are counted but not laid out as a matrix of classes by classes, which nobody could
/// read and no memory holds: 60,000 classes would take 29 GB. Chosen by us.
pub const MOST_CONFUSED: usize = 1000;

/// The sums over evaluated examples.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ClassTotals {
    loss: f64,
    n_classes: usize,
    /// How many, by truth and answer; those that came.
    confusion: BTreeMap<(u32, u32), u64>,
    bins: [Bin; BINS],
    /// By group.
    groups: BTreeMap<u32, GroupCount>,
    /// What features were multiplied by, where a gate did so.
    gates: GateMean,
}

/// The examples whose first choice was given about the same probability.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Bin {
    /// Examples.
    pub count: u64,
    /// The sum of the probabilities.
    pub confidence: f64,
    /// Examples whose first choice was right.
    pub correct: u64,
}

/// The examples of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GroupCount {
    /// All of them.
    pub examples: u64,
    /// Those that were told.
    pub correct: u64,
}

impl GroupCount {
    /// Share of the examples that were told.
    pub fn accuracy(&self) -> f64 {
        self.correct as f64 / self.examples.max(1) as f64
    }
}

/// How well one class is told.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ClassScore {
    /// Examples of the class.
    pub examples: u64,
    /// Answers with this class.
    pub answers: u64,
    /// Share of the answers with this class that were right; 0 where there were none.
    pub precision: f64,
    /// Share of the examples of the class that were told.
    pub recall: f64,
    /// The harmonic mean of both.
    pub f1: f64,
}

impl ClassTotals {
    /// The sums of a batch: `logits` are `[batch, classes]`. Everything beyond a score is computed in f64, example by example,
    /// so that it does not matter how batches are cut. Of equal scores the first class wins.
    pub fn of(logits: &[f32], labels: &[u32], groups: &[u32]) -> Self {
        let n_classes = logits.len() / labels.len().max(1);
        let mut sums = Self { n_classes, ..Self::default() };
        for ((row, &label), &group) in logits.chunks_exact(n_classes.max(1)).zip(labels).zip(groups) {
            let (mut first, mut largest) = (0, f64::NEG_INFINITY);
            for (class, &score) in row.iter().enumerate() {
                if f64::from(score) > largest {
                    (first, largest) = (class, f64::from(score));
                }
            }
            let rest: f64 = row.iter().map(|&score| (f64::from(score) - largest).exp()).sum();
            sums.loss += largest + rest.ln() - f64::from(row[label as usize]);
            *sums.confusion.entry((label, first as u32)).or_default() += 1;
            let confidence = 1.0 / rest;
            let bin = &mut sums.bins[((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1];
            bin.count += 1;
            bin.confidence += confidence;
            bin.correct += u64::from(first == label as usize);
            let count = sums.groups.entry(group).or_default();
            count.examples += 1;
            count.correct += u64::from(first == label as usize);
        }
        sums
    }

    /// The same with what a gate multiplied the features of the batch by, `[batch, layers, dim]`.
    pub fn with_gates(mut self, factor: Tensor<3>) -> Self {
        self.gates.add(factor);
        self
    }

    /// Which layers and features the gate let through; `None` where there is no gate.
    pub fn importance(&self) -> Option<Importance> {
        self.gates.importance()
    }

    /// Examples.
    pub fn examples(&self) -> u64 {
        self.confusion.values().sum()
    }

    /// `[truth, answer]` row-major; `None` where that would be more than [`MOST_CONFUSED`] classes by as many.
    pub fn confusion(&self) -> Option<Vec<u64>> {
        let n = self.n_classes;
        (n <= MOST_CONFUSED).then(|| {
            let mut matrix = vec![0; n * n];
            for (&(truth, answer), &count) in &self.confusion {
                matrix[truth as usize * n + answer as usize] = count;
            }
            matrix
        })
    }

    /// Class by class.
    pub fn classes(&self) -> Vec<ClassScore> {
        let share = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 / of as f64 };
        // Examples, answers, and those that are right, by class.
        let mut counts = vec![[0; 3]; self.n_classes];
        for (&(truth, answer), &count) in &self.confusion {
            counts[truth as usize][0] += count;
            counts[answer as usize][1] += count;
            counts[truth as usize][2] += if truth == answer { count } else { 0 };
        }
        let class = |[examples, answers, right]: [u64; 3]| {
            let f1 = share(2 * right, examples + answers);
            ClassScore { examples, answers, precision: share(right, answers), recall: share(right, examples), f1 }
        };
        counts.into_iter().map(class).collect()
    }

    /// The mean F1 over the classes that occur, or are answered with.
    pub fn macro_f1(&self) -> f64 {
        let mut counted = self.classes();
        counted.retain(|class| class.examples > 0 || class.answers > 0);
        counted.iter().map(|class| class.f1).sum::<f64>() / counted.len().max(1) as f64
    }

    /// The least share of a class that was told, over the classes that occur.
    pub fn worst_recall(&self) -> f64 {
        let classes = self.classes().into_iter().filter(|class| class.examples > 0);
        classes.map(|class| class.recall).reduce(f64::min).unwrap_or(0.0)
    }

    /// By the group that the data tells of each example.
    pub fn groups(&self) -> &BTreeMap<u32, GroupCount> {
        &self.groups
    }

    /// The accuracy of the group with the least; `None` where the data tells no groups.
    pub fn worst_group_accuracy(&self) -> Option<f64> {
        self.groups.values().map(GroupCount::accuracy).reduce(f64::min).filter(|_| self.groups.len() > 1)
    }

    /// Expected calibration error: how far apart confidence and accuracy are, on average over 15 bins of confidence.
    pub fn calibration_error(&self) -> f64 {
        let gaps = self.bins.iter().map(|bin| (bin.confidence - bin.correct as f64).abs());
        gaps.sum::<f64>() / self.examples().max(1) as f64
    }
}

impl EvalTotals for ClassTotals {
    fn add(&mut self, other: Self) {
        if self.n_classes == 0 {
            *self = other;
            return;
        }
        assert!(other.n_classes == self.n_classes || other.n_classes == 0, "sums of two kinds of data");
        self.loss += other.loss;
        for (place, more) in other.confusion {
            *self.confusion.entry(place).or_default() += more;
        }
        for (sum, more) in self.bins.iter_mut().zip(other.bins) {
            sum.count += more.count;
            sum.confidence += more.confidence;
            sum.correct += more.correct;
        }
        for (group, more) in other.groups {
            let count = self.groups.entry(group).or_default();
            count.examples += more.examples;
            count.correct += more.correct;
        }
        self.gates.merge(other.gates);
    }

    fn evaluated(&self) -> Evaluated {
        let correct =
            self.confusion.iter().filter(|((truth, answer), _)| truth == answer).map(|(_, count)| count).sum();
        Evaluated { loss: self.loss, correct, targets: self.examples(), bytes: 0 }
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        let of_groups = self.worst_group_accuracy().map(|accuracy| ("worst_group_accuracy/validation", accuracy));
        let mut numbers = vec![
            ("macro_f1/validation", self.macro_f1()),
            ("worst_recall/validation", self.worst_recall()),
            ("calibration_error/validation", self.calibration_error()),
        ];
        numbers.extend(of_groups);
        numbers
    }

    fn of_parts(&self) -> Vec<(String, f64)> {
        let shares = self.importance().map_or(Vec::new(), |importance| importance.shares());
        let name = |layer: usize| format!("importance/layer_{layer:02}");
        shares.into_iter().enumerate().map(|(layer, share)| (name(layer), f64::from(share))).collect()
    }

    /// Confusions: rows are the truth, each divided by its examples; columns what was answered. Importance: rows are layers,
    /// columns their features. Very many classes have no image.
    fn matrices(&self) -> Vec<(&'static str, Matrix)> {
        let n = self.n_classes;
        let confusion = self.confusion().map(|matrix| {
            let rows = matrix.chunks(n.max(1)).flat_map(|row| {
                let examples = row.iter().sum::<u64>().max(1) as f32;
                row.iter().map(move |&count| count as f32 / examples)
            });
            ("confusion/validation", Matrix { rows: n, cols: n, values: rows.collect() })
        });
        let importance = self.importance().map(|importance| {
            let (values, cols) = (importance.factor, importance.features);
            ("importance/factor", Matrix { rows: values.len() / cols, cols, values })
        });
        confusion.into_iter().chain(importance).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Worked by hand: three classes, six examples, one tie that the first class wins.
    const LOGITS: [f32; 18] = [9., 0., 0., 0., 9., 0., 9., 0., 0., 0., 9., 0., 0., 0., 9., 1., 1., 0.];
    const LABELS: [u32; 6] = [0, 1, 1, 1, 2, 2];
    const GROUPS: [u32; 6] = [0, 3, 3, 0, 0, 3];

    #[test]
    fn numbers_are_those_worked_by_hand() {
        let sums = ClassTotals::of(&LOGITS, &LABELS, &GROUPS);
        assert_eq!(sums.confusion().expect("few classes"), [1, 0, 0, 1, 2, 0, 1, 0, 1]);
        assert_eq!((sums.evaluated().correct, sums.evaluated().targets), (4, 6));
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-9, "{got} against {want}");
        let classes = sums.classes();
        near(classes[0].precision, 1.0 / 3.0);
        near(classes[0].f1, 0.5);
        near(classes[1].recall, 2.0 / 3.0);
        near(classes[1].f1, 0.8);
        near(classes[2].f1, 2.0 / 3.0);
        near(sums.macro_f1(), (0.5 + 0.8 + 2.0 / 3.0) / 3.0);
        near(sums.worst_recall(), 0.5);
        let told = |group| sums.groups()[&group].accuracy();
        near(told(0), 1.0);
        near(told(3), 1.0 / 3.0);
        near(sums.worst_group_accuracy().expect("groups"), 1.0 / 3.0);
        assert_eq!(ClassTotals::of(&LOGITS, &LABELS, &[0; 6]).worst_group_accuracy(), None);
        let (sure, unsure) = (1.0 / (1.0 + 2.0 * (-9f64).exp()), 1.0 / (2.0 + (-1f64).exp()));
        near(sums.calibration_error(), ((5.0 * sure - 4.0).abs() + unsure) / 6.0);
        let right = -(sure.ln());
        near(sums.evaluated().loss, 4.0 * right + (9.0 + right) + (1.0 - unsure.ln()));
    }

    #[test]
    fn a_class_that_is_only_answered_with_lowers_the_mean() {
        let sums = ClassTotals::of(&[9., 0., 0., 0., 9., 0., 0., 0., 9.], &[0, 1, 1], &[0; 3]);
        assert_eq!((sums.classes()[2].examples, sums.classes()[2].answers), (0, 1));
        assert!((sums.macro_f1() - (1.0 + 2.0 / 3.0 + 0.0) / 3.0).abs() < 1e-9, "{}", sums.macro_f1());
        // A class that nobody speaks of does not count.
        let sums = ClassTotals::of(&[9., 0., 0., 0., 9., 0.], &[0, 1], &[0; 2]);
        assert!((sums.macro_f1() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn very_many_classes_take_memory_for_those_that_came_only() {
        let n = 60_000;
        let mut logits = vec![0.0; 2 * n];
        (logits[n - 1], logits[n + 7]) = (9.0, 9.0);
        let mut sums = ClassTotals::of(&logits, &[n as u32 - 1, 3], &[0; 2]);
        sums.add(ClassTotals::of(&logits[..n], &[0], &[0]));
        assert_eq!((sums.evaluated().correct, sums.examples(), sums.confusion()), (1, 3, None));
        assert!(sums.matrices().is_empty());
        let classes = sums.classes();
        assert_eq!((classes.len(), classes[n - 1].answers, classes[n - 1].examples), (n, 2, 1));
        assert!((sums.macro_f1() - (2.0 / 3.0) / 4.0).abs() < 1e-12, "{}", sums.macro_f1());
    }

    #[test]
    fn batches_may_be_cut_anywhere() {
        let mut parts = ClassTotals::default();
        parts.add(ClassTotals::of(&LOGITS[..6], &LABELS[..2], &GROUPS[..2]));
        parts.add(ClassTotals::of(&LOGITS[6..], &LABELS[2..], &GROUPS[2..]));
        let whole = ClassTotals::of(&LOGITS, &LABELS, &GROUPS);
        assert_eq!((parts.confusion(), parts.groups()), (whole.confusion(), whole.groups()));
        assert!((parts.evaluated().loss - whole.evaluated().loss).abs() < 1e-12);
        assert!((parts.calibration_error() - whole.calibration_error()).abs() < 1e-12);
        let matrices = parts.matrices();
        assert_eq!((matrices[0].1.rows, matrices[0].1.values[3]), (3, 1.0 / 3.0));
    }
}
