//! What a mixture is validated on: the held-out rows of every source, whatever its weight, so that mixtures of the same sources are
//! compared on the same text. The first rows of all sources come first, so that few batches have all sources alike.

use std::sync::Arc;

use super::{Part, rows_of};
use crate::DataError;
use crate::batches::{Sample, Samples};
use crate::documents::Windows;
use crate::options::OpenOptions;

pub(super) struct HeldOut {
    names: Arc<[String]>,
    rows: Vec<Windows>,
    /// Source and row.
    order: Vec<(usize, u64)>,
}

impl HeldOut {
    pub(super) fn new(parts: &[Part], names: &Arc<[String]>, options: &OpenOptions) -> Result<Self, DataError> {
        let of =
            |(number, part): (usize, &Part)| rows_of(parts, (number, &part.split.validation), names, options, None);
        let rows: Vec<Windows> = parts.iter().enumerate().map(of).collect::<Result<_, _>>()?;
        let own = |(number, rows): (usize, &Windows)| (0..rows.per_epoch()).map(move |row| (number, row));
        let mut order: Vec<(usize, u64)> = rows.iter().enumerate().flat_map(own).collect();
        order.sort_by_key(|&(number, row)| (row, number));
        Ok(Self { names: names.clone(), rows, order })
    }
}

impl Samples for HeldOut {
    fn per_epoch(&self) -> u64 {
        self.order.len() as u64
    }

    fn sample(&self, _epoch: u64, index: u64) -> Result<Sample, DataError> {
        let (source, row) = self.order[index as usize];
        self.rows[source].sample(0, row)
    }

    fn sources(&self) -> Arc<[String]> {
        self.names.clone()
    }
}
