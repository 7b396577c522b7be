//! A change at one site of a layer: which heads, which positions, and what becomes of the numbers there.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Bool, Device, Tensor, TensorData};
use polyhead_kernels::in_type;

use super::{KvHead, KvSite, QueryHead, QuerySite, Site, StreamSite};

/// A change at one site of a layer.
#[derive(Debug, Clone)]
pub struct Edit {
    /// The site, and which of its heads.
    pub at: At,
    /// The tokens whose numbers change; of a map, the queries.
    pub positions: Positions,
    /// Of a map, the keys.
    pub keys: Positions,
    /// What becomes of the numbers.
    pub change: Change,
}

impl Edit {
    /// A change of all positions.
    pub fn new(at: At, change: Change) -> Self {
        Self { at, positions: Positions::All, keys: Positions::All, change }
    }
}

/// A site with its heads; no heads named means all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// In the residual stream.
    Stream(StreamSite),
    /// Of query heads.
    Query(QuerySite, Vec<QueryHead>),
    /// Of key/value heads.
    Kv(KvSite, Vec<KvHead>),
}

impl At {
    /// All heads of a site.
    pub fn all(site: Site) -> Self {
        match site {
            Site::Stream(site) => Self::Stream(site),
            Site::Query(site) => Self::Query(site, Vec::new()),
            Site::Kv(site) => Self::Kv(site, Vec::new()),
        }
    }

    /// The site.
    pub fn site(&self) -> Site {
        match *self {
            Self::Stream(site) => site.into(),
            Self::Query(site, _) => site.into(),
            Self::Kv(site, _) => site.into(),
        }
    }

    /// The named heads by number.
    pub fn heads(&self) -> Vec<usize> {
        match self {
            Self::Stream(_) => Vec::new(),
            Self::Query(_, heads) => heads.iter().map(|head| head.0).collect(),
            Self::Kv(_, heads) => heads.iter().map(|head| head.0).collect(),
        }
    }
}

/// Positions of the text, counted from the first token that a cache holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Positions {
    /// All.
    #[default]
    All,
    /// The same in every row of the batch.
    Range(Range<usize>),
    /// Row by row.
    Rows {
        /// Of each row of the batch (or one for all rows) whether each position is meant.
        rows: Arc<[Vec<bool>]>,
        /// Whether positions behind the end of a row are.
        beyond: bool,
    },
}

impl Positions {
    /// One position.
    pub fn only(position: usize) -> Self {
        Self::Range(position..position + 1)
    }

    /// Of `count` positions from `start` whether each is meant, row by row; `None` where all are.
    fn flags(&self, start: usize, count: usize) -> Option<Vec<Vec<bool>>> {
        let all = start..start + count;
        let flags: Vec<Vec<bool>> = match self {
            Self::All => return None,
            Self::Range(range) => vec![all.map(|position| range.contains(&position)).collect()],
            Self::Rows { rows, beyond } => {
                let of = |row: &Vec<bool>| {
                    all.clone().map(|position| row.get(position).copied().unwrap_or(*beyond)).collect()
                };
                rows.iter().map(of).collect()
            }
        };
        flags.iter().flatten().any(|chosen| !chosen).then_some(flags)
    }
}

/// A number for all, or a tensor whose axes are those of the site or 1. Along positions (and, of a map, keys) it begins at the
/// first position of the text; what is behind its end stays as it is.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "a tensor is what most of them hold, and there are few")]
pub enum Amount {
    /// One number.
    Number(f64),
    /// `[batch or 1, heads or 1, positions or 1, width or keys or 1]`
    Each(Tensor<4>),
}

/// A function of the numbers at a site, and where its rows and columns are in the text.
pub type Function = Arc<dyn Fn(Tensor<4>, Place) -> Tensor<4> + Send + Sync>;

/// What becomes of the numbers at a site.
#[derive(Clone)]
#[expect(clippy::large_enum_variant, reason = "a tensor is what most of them hold, and there are few")]
pub enum Change {
    /// `gate · x + value`: scaled, zeroed, shifted, replaced or mixed.
    Affine {
        /// The factor.
        gate: Amount,
        /// The addend.
        value: Amount,
    },
    /// Weights times a factor; then every changed row has the sum that it had.
    Reweight(Amount),
    /// The component along a direction is set: `x + (to - x · d) d`.
    Clamp {
        /// `[width]`, of length 1.
        direction: Tensor<1>,
        /// The component.
        to: f64,
    },
    /// Whatever a function makes of all numbers of the site; heads and positions that are not meant stay as they are.
    With(Function),
}

impl Change {
    /// `factor · x`
    pub fn scale(factor: f64) -> Self {
        Self::Affine { gate: Amount::Number(factor), value: Amount::Number(0.0) }
    }

    /// `x + value`
    pub fn add(value: Amount) -> Self {
        Self::Affine { gate: Amount::Number(1.0), value }
    }

    /// `(1 - gate) · x + gate · value`
    pub fn blend(gate: Amount, value: Amount) -> Self {
        let value = match (&gate, value) {
            (Amount::Number(gate), Amount::Number(value)) => Amount::Number(gate * value),
            (Amount::Number(number), Amount::Each(each)) => Amount::Each(each * *number),
            (Amount::Each(each), Amount::Number(number)) => Amount::Each(each.clone() * number),
            (Amount::Each(gate), Amount::Each(value)) => Amount::Each(value * gate.clone()),
        };
        let gate = match gate {
            Amount::Number(gate) => Amount::Number(1.0 - gate),
            Amount::Each(gate) => Amount::Each(1.0 - gate),
        };
        Self::Affine { gate, value }
    }

    /// `value`
    pub fn replace(value: Tensor<4>) -> Self {
        Self::Affine { gate: Amount::Number(0.0), value: Amount::Each(value) }
    }

    /// The tensors that it holds, whose axes must fit the site.
    pub fn amounts(&self) -> Vec<&Tensor<4>> {
        let amounts = match self {
            Self::Affine { gate, value } => vec![gate, value],
            Self::Reweight(factor) => vec![factor],
            Self::Clamp { .. } | Self::With(_) => Vec::new(),
        };
        amounts
            .into_iter()
            .filter_map(|amount| if let Amount::Each(each) = amount { Some(each) } else { None })
            .collect()
    }

    /// Positions along an axis that its tensors reach; `None` where they hold for all.
    fn reach(&self, axis: usize) -> Option<usize> {
        self.amounts().iter().map(|each| each.dims()[axis]).filter(|&size| size > 1).min()
    }
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Affine { gate, value } => write!(f, "Affine {{ gate: {gate:?}, value: {value:?} }}"),
            Self::Reweight(factor) => write!(f, "Reweight({factor:?})"),
            Self::Clamp { to, .. } => write!(f, "Clamp {{ to: {to} }}"),
            Self::With(_) => f.write_str("With(..)"),
        }
    }
}

/// Where the numbers of a call are in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The position of the first row.
    pub first: usize,
    /// Of a map, that of the first key.
    pub first_key: Option<usize>,
}

/// What an edit means of the numbers of a call.
#[expect(clippy::large_enum_variant, reason = "a tensor is what most of them hold, and there are few")]
enum Chosen {
    Nothing,
    All,
    /// True where it is meant; every axis is that of the numbers or 1.
    Some(Tensor<4, Bool>),
}

impl Edit {
    /// The numbers `x` of its site, changed.
    pub(super) fn apply(&self, x: Tensor<4>, place: Place) -> Tensor<4> {
        let full = x.dims();
        match self.chosen(full, place, &x.device()) {
            Chosen::Nothing => x,
            Chosen::All => self.change.apply(x, place, None),
            Chosen::Some(chosen) => {
                let chosen = chosen.expand(full);
                let changed = self.change.apply(x.clone(), place, Some(&chosen));
                match &self.change {
                    // What it leaves out of its rows changes too, so that their sums stay.
                    Change::Reweight(_) => changed,
                    _ => x.mask_where(chosen, changed),
                }
            }
        }
    }

    /// As an addition to scores, `[batch or 1, heads or 1, queries or 1, keys]`; `None` where it is another change.
    ///
    /// # Shapes
    /// - like: some tensor of the call, for its device and type; full: `[batch, heads, queries, keys]`
    pub(super) fn bias(&self, like: &Tensor<4>, full: [usize; 4], place: Place) -> Option<Option<Tensor<4>>> {
        let Change::Affine { gate: Amount::Number(1.0), value } = &self.change else { return None };
        let keys = full[3];
        let value = match value {
            Amount::Number(number) => Tensor::full([1; 4], *number, (&like.device(), like.dtype())),
            Amount::Each(each) => fitted(each, like, full, place),
        };
        Some(match self.chosen(full, place, &like.device()) {
            Chosen::Nothing => None,
            Chosen::All => {
                let [batch, heads, queries, _] = value.dims();
                Some(value.expand([batch, heads, queries, keys]))
            }
            Chosen::Some(chosen) => {
                let (a, b) = (value.dims(), chosen.dims());
                let shape = [a[0].max(b[0]), a[1].max(b[1]), a[2].max(b[2]), keys];
                Some(value.expand(shape).mask_fill(chosen.bool_not().expand(shape), 0.0))
            }
        })
    }

    fn chosen(&self, [batch, heads, rows, columns]: [usize; 4], place: Place, device: &Device) -> Chosen {
        let mut parts: Vec<Tensor<4, Bool>> = Vec::new();
        let mut nothing = false;
        let mut part = |flags: Vec<Vec<bool>>, axis: usize| {
            nothing |= flags.iter().flatten().all(|chosen| !chosen);
            let (of_rows, size) = (flags.len(), flags.first().map_or(0, Vec::len));
            assert!(
                of_rows == 1 || of_rows == batch,
                "an edit marks positions of {of_rows} rows in a batch of {batch}"
            );
            let mut shape = [of_rows, 1, 1, 1];
            shape[axis] = size;
            parts.push(Tensor::<4, Bool>::from_data(TensorData::new(flags.concat(), shape), device));
        };
        let named = self.at.heads();
        if !named.is_empty() {
            part(vec![(0..heads).map(|head| named.contains(&head)).collect()], 1);
        }
        let axes = [(2, &self.positions, Some(place.first), rows), (3, &self.keys, place.first_key, columns)];
        for (axis, positions, start, count) in axes {
            let Some(start) = start else { continue };
            positions.flags(start, count).into_iter().for_each(|flags| part(flags, axis));
            if let Some(reach) = self.change.reach(axis) {
                Positions::Range(0..reach).flags(start, count).into_iter().for_each(|flags| part(flags, axis));
            }
        }
        if nothing {
            return Chosen::Nothing;
        }
        let shape = parts.iter().fold([1; 4], |shape: [usize; 4], part| {
            let dims = part.dims();
            std::array::from_fn(|axis| shape[axis].max(dims[axis]))
        });
        match parts.into_iter().map(|part| part.expand(shape)).reduce(Tensor::bool_and) {
            Some(chosen) => Chosen::Some(chosen),
            None => Chosen::All,
        }
    }
}

impl Change {
    /// Of all numbers; `chosen` has the shape of `x`.
    fn apply(&self, x: Tensor<4>, place: Place, chosen: Option<&Tensor<4, Bool>>) -> Tensor<4> {
        let full = x.dims();
        match self {
            Self::Affine { gate, value } => {
                let like = x.clone();
                let scaled = match gate {
                    // What is replaced may be infinite, as the scores of hidden keys are.
                    Amount::Number(0.0) => None,
                    Amount::Number(1.0) => Some(x),
                    Amount::Number(gate) => Some(x * *gate),
                    Amount::Each(gate) => Some(x * fitted(gate, &like, full, place)),
                };
                match (scaled, value) {
                    (Some(scaled), Amount::Number(0.0)) => scaled,
                    (Some(scaled), Amount::Number(value)) => scaled + *value,
                    (Some(scaled), Amount::Each(value)) => scaled + fitted(value, &like, full, place),
                    (None, Amount::Number(value)) => Tensor::full(full, *value, (&like.device(), like.dtype())),
                    (None, Amount::Each(value)) => fitted(value, &like, full, place).expand(full),
                }
            }
            Self::Reweight(factor) => {
                let changed = match factor {
                    Amount::Number(factor) => x.clone() * *factor,
                    Amount::Each(factor) => x.clone() * fitted(factor, &x, full, place),
                };
                let changed = match chosen {
                    Some(chosen) => x.clone().mask_where(chosen.clone(), changed),
                    None => changed,
                };
                let (before, after) = (x.clone().sum_dim(3), changed.clone().sum_dim(3));
                // A quotient by next to nothing has no gradient.
                let nothing = after.clone().lower_elem(f32::MIN_POSITIVE);
                let renormalised = changed * (before / after.mask_fill(nothing, 1.0));
                match chosen {
                    // To the bit as it was in the rows of other heads and queries.
                    Some(chosen) => {
                        let rows = chosen.clone().any_dim(3).expand(full);
                        x.mask_where(rows, renormalised)
                    }
                    None => renormalised,
                }
            }
            Self::Clamp { direction, to } => {
                let direction = alike(direction.clone(), &x).reshape([1, 1, 1, full[3]]);
                let component = (x.clone() * direction.clone()).sum_dim(3);
                x + (-component + *to) * direction
            }
            Self::With(function) => function(x, place),
        }
    }
}

/// A tensor on the device and in the type of another.
fn alike<const D: usize>(x: Tensor<D>, like: &Tensor<4>) -> Tensor<D> {
    let x = match (x.is_autodiff(), like.is_autodiff()) {
        (false, true) => Tensor::from_inner(x),
        (true, false) => x.inner(),
        _ => x,
    };
    in_type(x, like.dtype())
}

/// The part of an amount that a call meets, along the axes of positions; zeros where the amount has ended.
fn fitted(each: &Tensor<4>, like: &Tensor<4>, full: [usize; 4], place: Place) -> Tensor<4> {
    let mut part = alike(each.clone(), like);
    for (axis, start) in [(2, Some(place.first)), (3, place.first_key)] {
        let (Some(start), size) = (start, part.dims()[axis]) else { continue };
        if size == 1 || (start == 0 && size == full[axis]) {
            continue;
        }
        let there = size.saturating_sub(start).min(full[axis]);
        let mut missing = part.dims();
        missing[axis] = full[axis] - there;
        let kept = (there > 0).then(|| part.clone().narrow(axis, start, there));
        let zeros = (missing[axis] > 0).then(|| Tensor::zeros(missing, (&part.device(), part.dtype())));
        part = Tensor::cat(kept.into_iter().chain(zeros).collect(), axis);
    }
    part
}
