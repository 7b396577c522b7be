//! How well queries find their own document among all.

/// Ranks that recall is told for.
pub const RECALL_AT: [usize; 3] = [1, 5, 10];

/// How well queries find their own document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retrieval {
    /// Share of queries whose document is among the first 1, 5 and 10 ([`RECALL_AT`]).
    pub recall: [f64; RECALL_AT.len()],
    /// Mean of one over the rank of the own document (mean reciprocal rank).
    pub mrr: f64,
}

impl Retrieval {
    /// Of embeddings, of which row i of `queries` belongs to row i of `documents`; further documents belong to none. They are
    /// compared by their product, which is the cosine where all have length 1. A document with the same product as the own one
    /// counts as better: whoever embeds everything alike finds nothing.
    ///
    /// # Shapes
    /// - queries: `[n, dim]`, documents: `[n or more, dim]`, both row-major
    pub fn of(queries: &[f32], documents: &[f32], dim: usize) -> Self {
        let n = queries.len() / dim.max(1);
        let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let rank = |(at, query): (usize, &[f32])| {
            let own = product(query, &documents[at * dim..(at + 1) * dim]);
            let better = |(other, document): (usize, &[f32])| other != at && product(query, document) >= own;
            1 + documents.chunks(dim).enumerate().filter(|&(other, document)| better((other, document))).count()
        };
        let ranks: Vec<usize> = queries.chunks(dim.max(1)).enumerate().map(rank).collect();
        let mean = |value: &dyn Fn(usize) -> f64| ranks.iter().map(|rank| value(*rank)).sum::<f64>() / n.max(1) as f64;
        Self {
            recall: RECALL_AT.map(|most| mean(&|rank| f64::from(u8::from(rank <= most)))),
            mrr: mean(&|rank| 1.0 / rank as f64),
        }
    }

    /// The numbers by their names.
    pub fn numbers(&self) -> Vec<(String, f64)> {
        let recall = RECALL_AT.iter().zip(self.recall).map(|(rank, value)| (format!("recall_at_{rank}"), value));
        recall.chain([("mrr".to_owned(), self.mrr)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_those_worked_by_hand() {
        // Against the documents (1, 0), (0, 1), (-1, 0): the first query finds its own first, the second last, the third second.
        let (queries, documents) = ([1.0, 0.5, 0.2, -1.0, -0.1, 0.5], [1.0, 0.0, 0.0, 1.0, -1.0, 0.0]);
        let found = Retrieval::of(&queries, &documents, 2);
        assert_eq!(found.recall, [1.0 / 3.0, 1.0, 1.0]);
        assert!((found.mrr - (1.0 + 1.0 / 3.0 + 0.5) / 3.0).abs() < 1e-12);
    }

    #[test]
    fn equal_embeddings_find_nothing_and_strangers_distract() {
        let same = [1.0; 24];
        let found = Retrieval::of(&same, &same, 2);
        assert_eq!((found.recall, found.mrr), ([0.0; 3], 1.0 / 12.0));
        let own = [1.0, 0.0];
        assert_eq!(Retrieval::of(&own, &own, 2).mrr, 1.0);
        assert_eq!(Retrieval::of(&own, &[1.0, 0.0, 2.0, 0.0], 2).mrr, 0.5);
    }
}
