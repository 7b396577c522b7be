//! The laws of changes that interventions make of maps and streams, for every mechanism: they obey the mask, decode token by token as
//! in a full pass, stay with the head that they name, and are refused where a mechanism has no map.
#![allow(clippy::unwrap_used)]

use burn::tensor::Tensor;
use polyhead_attention::{At, Change, Edit, Mask, QuerySite, Site};
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference, numbers};
use serde_json::{Value, json};

use super::*;
use crate::Pass;
use crate::testing::decoders;

const TOKENS: [u32; 7] = [1, 5, 3, 2, 9, 4, 6];
/// Where the rest is generated.
const PROMPT: usize = 4;
/// The layer that is changed.
const LAYER: usize = 1;

/// Every kind of change that is made of functions, and a clamp: its site and keys.
fn kinds() -> Vec<(&'static str, Option<Value>, Value)> {
    let span = |from: usize, to: usize| Some(json!({ "from": from, "to": to }));
    let sinks = json!([{ "from": 1, "to": 2 }]);
    vec![
        ("weights", None, json!({ "to_identity": 0.5 })),
        ("scores", span(1, 4), json!({ "boost": 2.0 })),
        ("scores", None, json!({ "recent": { "newest": 2, "beta": 3.0 } })),
        ("weights", span(1, 3), json!({ "gaze": { "multiplier": [3.0, 9.0], "question": { "from": 3, "to": 4 } } })),
        ("weights", span(1, 4), json!({ "redistribute": { "sinks": sinks, "rho": 1.0, "least_mass": 0.0 } })),
        ("z", None, json!({ "clamp": { "direction": "d", "to": 3.0 } })),
        ("v", None, json!({ "clamp": { "direction": "d", "to": 3.0 } })),
        ("resid_mid", None, json!({ "clamp": { "direction": "d", "to": 3.0 } })),
    ]
}

/// The edit of a kind, of some heads or of all.
fn open(
    model: &Decoder,
    (site, keys, change): &(&str, Option<Value>, Value),
    heads: Option<usize>,
) -> Result<Intervention, String> {
    let mut edit = json!({ "site": site, "layers": [LAYER], "change": change });
    keys.iter().for_each(|keys| edit["keys"] = keys.clone());
    heads.iter().for_each(|head| edit["heads"] = json!([head]));
    let config: InterventionConfig = serde_json::from_value(json!({ "tensors": "file", "edits": [edit] })).unwrap();
    config.validate(&|_, _| None).map_err(|error| error.to_string())?;
    let [_, width] = read::sizes(model, LAYER, Site::named(site).unwrap());
    let values = (0..width).map(|at| if at % 3 == 0 { 2.0 } else { -1.0 }).collect();
    let tensors = BTreeMap::from([("d".to_owned(), Named { name: "d".into(), shape: vec![width], values })]);
    Intervention::new(&config, &tensors, model, None).map_err(|error| error.to_string())
}

/// `[1, seq, d_model]` in parts, the later ones from the cache.
fn run(model: &Decoder, tokens: &[u32], parts: &[usize]) -> Tensor<3> {
    let context = Context { rows: 1, tokens: &tokens[..PROMPT], prompt: PROMPT, ..Context::default() };
    let (mut cache, mask) = (model.new_cache(), Mask::causal());
    let each = parts.iter().map(|count| {
        let start = cache.len();
        let batch = Batch::text(tokens[start..start + count].to_vec());
        let pass = Pass { cache: Some(&mut cache), context: Some(context), ..Pass::new(&mask) };
        model.pass(model.tokens(&batch), pass).hidden
    });
    Tensor::cat(each.collect(), 1)
}

#[test]
fn changes_obey_the_mask_and_the_cache_in_every_mechanism() {
    for plain in decoders() {
        let name = plain.config().mechanism(LAYER).name();
        let whole = run(&plain, &TOKENS, &[7]);
        for kind in kinds() {
            let site = Site::named(kind.0).unwrap();
            let opened = open(&plain, &kind, None);
            if let Some(reason) = plain.config().mechanism(LAYER).absent(site) {
                let told = opened.unwrap_err();
                assert!(told.contains(name) && told.contains(reason), "{told}");
                continue;
            }
            let model = plain.clone().intervened(Some(opened.unwrap()));
            let own = run(&model, &TOKENS, &[7]);
            let about = format!("{name}: {} at {}", kind.2, kind.0);
            assert!(largest_difference(own.clone(), whole.clone()) > 1e-4, "{about} changes nothing");
            assert_tensors_close(&about, run(&model, &TOKENS, &[4, 1, 2]), own.clone(), Tolerance::absolute(2e-5));
            let other = [&TOKENS[..5], &[7, 8]].concat();
            let other = run(&model, &other, &[7]);
            let [seen, behind] =
                [(0, 5), (5, 2)].map(|(start, length)| [&own, &other].map(|x| x.clone().narrow(1, start, length)));
            let ([own, other], [mine, others]) = (seen, behind);
            assert_tensors_close(&about, other, own, Tolerance::absolute(2e-5));
            assert!(largest_difference(mine, others) > 1e-3, "{about}");
        }
    }
}

#[test]
fn changes_of_a_head_reach_the_outputs_that_it_is_part_of() {
    for plain in decoders() {
        let mechanism = plain.config().mechanism(LAYER).clone();
        let Ok(wiring) = mechanism.wiring() else { continue };
        // With the map as a matrix in both runs, so that bits can be compared.
        let kept = |site: QuerySite| {
            let same = Change::With(Arc::new(|x: Tensor<4>, _| x));
            (LAYER, Edit::new(At::all(site.into()), same))
        };
        let z = |model: &Decoder, site: QuerySite| -> Vec<Vec<f32>> {
            let sites = SitePlan { edits: vec![kept(site)], taps: vec![(LAYER, QuerySite::Z.into())] };
            let context = Context { rows: 1, tokens: &TOKENS, prompt: TOKENS.len(), ..Context::default() };
            let mask = Mask::causal();
            let pass = Pass { sites, context: Some(context), ..Pass::new(&mask) };
            let values = model.pass(model.tokens(&Batch::text(TOKENS.to_vec())), pass).taps.remove(0).values;
            (0..values.dims()[1]).map(|head| numbers(values.clone().narrow(1, head, 1))).collect()
        };
        for kind in kinds() {
            let site = match Site::named(kind.0) {
                Some(Site::Query(site)) => site,
                _ => continue,
            };
            if mechanism.absent(site.into()).is_some() {
                continue;
            }
            let clean = z(&plain, site);
            let outputs = |head: usize| wiring[head].outputs.clone().collect();
            let heads = if site == QuerySite::Z { clean.len() } else { wiring.len() };
            for head in 0..heads {
                let model = plain.clone().intervened(Some(open(&plain, &kind, Some(head)).unwrap()));
                let edited = z(&model, site);
                let changed: Vec<usize> = (0..clean.len()).filter(|&other| clean[other] != edited[other]).collect();
                let want: Vec<usize> = match site {
                    QuerySite::Z => vec![head],
                    _ => outputs(head),
                };
                let about = format!("{}: {} at {} of head {head}", mechanism.name(), kind.2, kind.0);
                match mechanism.name() {
                    // Where a head is not selected it has no output to change.
                    "mixture_of_head" => {
                        assert!(changed.iter().all(|other| want.contains(other)), "{about}: {changed:?}")
                    }
                    _ => assert_eq!(changed, want, "{about}"),
                }
            }
        }
    }
}
