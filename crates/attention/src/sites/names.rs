//! The places of a layer where a forward can be read and changed, and their names.

use std::fmt;
use std::ops::Range;

/// A query head of a layer, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueryHead(pub usize);

/// A key/value head of a layer, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KvHead(pub usize);

/// What a query head of a layer reads, and what is made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wiring {
    /// The head of its keys.
    pub key: KvHead,
    /// The head of its values.
    pub value: KvHead,
    /// The head outputs (`z`) that it is part of, counted as they are there.
    pub outputs: Range<usize>,
}

impl Wiring {
    /// Of a query head that has an output of its own.
    pub(crate) fn new(head: usize, key: usize, value: usize) -> Self {
        Self { key: KvHead(key), value: KvHead(value), outputs: head..head + 1 }
    }

    /// Of query heads of which as many in a row share each key/value head.
    pub(crate) fn even(n_heads: usize, n_kv_heads: usize) -> Vec<Self> {
        let shared = |head: usize| head / (n_heads / n_kv_heads.max(1)).max(1);
        (0..n_heads).map(|head| Self::new(head, shared(head), shared(head))).collect()
    }
}

/// Places in the residual stream: `[batch, 1, seq, d_model]`, scales `[batch, 1, seq, 1]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StreamSite {
    /// The residual stream before attention
    ResidPre,
    /// The scale that the norm before attention divides by; read-only
    AttnScale,
    /// What attention adds to the stream
    AttnOut,
    /// The residual stream between attention and the feed-forward layer
    ResidMid,
    /// The same as the feed-forward layer alone reads it, before its norm
    MlpIn,
    /// The scale that the norm before the feed-forward layer divides by; read-only
    MlpScale,
    /// What the feed-forward layer adds to the stream
    MlpOut,
    /// The residual stream behind the layer
    ResidPost,
}

/// Places of query heads: `[batch, heads, seq, width]`, of the map `[batch, heads, queries, keys]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QuerySite {
    /// Queries before rotation, normalised where heads are
    Q,
    /// Queries as scores are made of them
    RotQ,
    /// Scores before softmax; hidden keys are -∞
    Scores,
    /// Weights after softmax: the map
    Weights,
    /// What each head reads with its weights, before heads are subtracted, gated or normalised
    Attended,
    /// Head outputs before the output projection
    Z,
    /// Head outputs behind the output projection, without its bias: they add up to what attention writes
    Result,
}

/// Places of key/value heads: `[batch, heads, seq, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KvSite {
    /// Keys before rotation, normalised where heads are
    K,
    /// Keys as scores are made of them
    RotK,
    /// Values
    V,
}

/// A place of a layer where a forward can be read and changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// In the residual stream
    Stream(StreamSite),
    /// Of query heads
    Query(QuerySite),
    /// Of key/value heads
    Kv(KvSite),
}

impl From<StreamSite> for Site {
    fn from(site: StreamSite) -> Self {
        Self::Stream(site)
    }
}

impl From<QuerySite> for Site {
    fn from(site: QuerySite) -> Self {
        Self::Query(site)
    }
}

impl From<KvSite> for Site {
    fn from(site: KvSite) -> Self {
        Self::Kv(site)
    }
}

/// Every site with its name and what TransformerLens calls it inside `blocks.<layer>`; empty where it has no name there.
const TABLE: [(Site, &str, &str); 18] = [
    (Site::Stream(StreamSite::ResidPre), "resid_pre", "hook_resid_pre"),
    (Site::Stream(StreamSite::AttnScale), "attn_scale", "ln1.hook_scale"),
    (Site::Query(QuerySite::Q), "q", "attn.hook_q"),
    (Site::Kv(KvSite::K), "k", "attn.hook_k"),
    (Site::Kv(KvSite::V), "v", "attn.hook_v"),
    (Site::Query(QuerySite::RotQ), "rot_q", "attn.hook_rot_q"),
    (Site::Kv(KvSite::RotK), "rot_k", "attn.hook_rot_k"),
    (Site::Query(QuerySite::Scores), "scores", "attn.hook_attn_scores"),
    (Site::Query(QuerySite::Weights), "weights", "attn.hook_pattern"),
    (Site::Query(QuerySite::Attended), "attended", ""),
    (Site::Query(QuerySite::Z), "z", "attn.hook_z"),
    (Site::Query(QuerySite::Result), "result", "attn.hook_result"),
    (Site::Stream(StreamSite::AttnOut), "attn_out", "hook_attn_out"),
    (Site::Stream(StreamSite::ResidMid), "resid_mid", "hook_resid_mid"),
    (Site::Stream(StreamSite::MlpIn), "mlp_in", "hook_mlp_in"),
    (Site::Stream(StreamSite::MlpScale), "mlp_scale", "ln2.hook_scale"),
    (Site::Stream(StreamSite::MlpOut), "mlp_out", "hook_mlp_out"),
    (Site::Stream(StreamSite::ResidPost), "resid_post", "hook_resid_post"),
];

impl Site {
    /// Every site, in the order in which a layer passes them.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.into_iter().map(|(site, ..)| site)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        TABLE
            .into_iter()
            .find_map(|(site, name, _)| (site == self).then_some(name))
            .expect("every site is in the table")
    }

    /// The site of a name, ours or that of TransformerLens inside a block.
    pub fn named(name: &str) -> Option<Self> {
        TABLE
            .into_iter()
            .find_map(|(site, own, alias)| (name == own || name == alias && !alias.is_empty()).then_some(site))
    }

    /// Layer and site of a full name: `layers.3.z`, `blocks.3.attn.hook_z`.
    pub fn in_layer(name: &str) -> Option<(usize, Self)> {
        let (stack, rest) = name.split_once('.')?;
        let (layer, site) = rest.split_once('.')?;
        let of_stack = |(_, own, alias): &(Self, &'static str, &'static str)| match stack {
            "layers" => *own,
            "blocks" => *alias,
            _ => "",
        };
        let (found, ..) = TABLE.iter().find(|row| !site.is_empty() && of_stack(row) == site)?;
        Some((layer.parse().ok()?, *found))
    }

    /// All names: our own, then those of TransformerLens.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let own = TABLE.into_iter().map(|(_, own, _)| own);
        own.chain(TABLE.into_iter().map(|(.., alias)| alias).filter(|alias| !alias.is_empty()))
    }

    /// Whether it has queries and keys rather than channels.
    pub fn is_map(self) -> bool {
        matches!(self, Self::Query(QuerySite::Scores | QuerySite::Weights))
    }

    /// Whether it can be read only.
    pub fn is_read_only(self) -> bool {
        matches!(self, Self::Stream(StreamSite::AttnScale | StreamSite::MlpScale))
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_site_has_names_of_its_own() {
        for site in Site::all() {
            assert_eq!(Site::named(site.name()), Some(site));
            assert_eq!(Site::in_layer(&format!("layers.12.{site}")), Some((12, site)));
        }
        let mut names: Vec<_> = Site::names().collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 35);
        assert_eq!(Site::in_layer("blocks.3.attn.hook_z"), Some((3, QuerySite::Z.into())));
        assert_eq!(Site::in_layer("blocks.0.ln2.hook_scale"), Some((0, StreamSite::MlpScale.into())));
        for wrong in
            ["", "z", "blocks.z", "blocks.3.z", "layers.3.attn.hook_z", "layers.-1.z", "blocks.3.hook_zz", "layers.3."]
        {
            assert_eq!(Site::in_layer(wrong), None, "{wrong}");
        }
    }
}
