//! Rows of a table by their ids. In the backward the few rows that were read are added to the gradient that other uses of the
//! table (a tied output projection) have left, in place: Burn's own makes a table of zeros for each use, and adds tables.

use std::collections::HashMap;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Int, Tensor};
use burn_flex::FlexTensor;

use crate::weight::{Weight, as_weight};
use crate::{cpu, simd};

/// The rows of `table` with these ids; on the CPU in f32 where the table is bf16.
///
/// # Shapes
/// - table: `[rows, channels]`, ids: `[n]`
/// - output: `[n, channels]`
///
/// # Panics
/// If an id is not below the number of rows.
pub fn embedding(table: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    if !(cpu::is_flex(&table.device()) && matches!(table.dtype(), DType::F32 | DType::BF16)) {
        return table.select(0, ids);
    }
    let rows = table.dims()[0];
    let checked = |id: i64| {
        let found = usize::try_from(id).ok().filter(|&id| id < rows);
        found.unwrap_or_else(|| panic!("embedding: every id must be below the table's rows, {rows}; there is {id}"))
    };
    let ids = Ids(ids.into_data().iter::<i64>().map(checked).collect());
    Tensor::from_dispatch(Dispatch::embedding_rows(as_weight(table).into_dispatch(), ids))
}

/// Rows of a table, each of which is there.
#[derive(Debug, Clone)]
struct Ids(Arc<[usize]>);

#[backend_extension(Flex, Autodiff)]
trait EmbeddingRows: Backend {
    fn embedding_rows(table: FloatTensor<Self>, ids: Ids) -> FloatTensor<Self>;
}

impl EmbeddingRows for Flex {
    fn embedding_rows(table: FlexTensor, ids: Ids) -> FlexTensor {
        forward(table, &ids)
    }
}

impl<C: CheckpointStrategy> EmbeddingRows for Autodiff<Flex, C> {
    fn embedding_rows(table: FloatTensor<Self>, ids: Ids) -> FloatTensor<Self> {
        let rows = forward(table.primitive().clone(), &ids);
        match AddRows.prepare::<C>([table.node()]).compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((table, ids), rows),
            OpsKind::UnTracked(step) => step.finish(rows),
        }
    }
}

fn forward(table: FlexTensor, ids: &Ids) -> FlexTensor {
    let table = cpu::row_major(table);
    let table = Weight::of(&table);
    let channels = table.sizes()[1];
    let mut rows = Vec::with_capacity(ids.0.len() * channels);
    ids.0.iter().for_each(|&id| table.append_row(id, &mut rows));
    cpu::tensor(rows, [ids.0.len(), channels])
}

#[derive(Debug)]
struct AddRows;

impl Backward<Flex, 1> for AddRows {
    /// The table, by which its gradient is found, and which rows were read.
    type State = (FloatTensor<Autodiff<Flex>>, Ids);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let rows_grad = grads.consume::<Flex>(&ops.node);
        let ([Some(parent)], (table, ids)) = (ops.parents, ops.state) else { return };
        // Taken out, so that nobody else holds it and it is added to where it is.
        let so_far = grads.remove::<Flex>(&table);
        let so_far = so_far.map(cpu::whole).unwrap_or_else(|| {
            let shape = cpu::shape(table.primitive());
            cpu::tensor(vec![0.0; shape.iter().product()], shape)
        });
        grads.register::<Flex>(parent.id, with_rows(so_far, &ids, &rows_grad.to_contiguous()));
    }
}

/// `table_grad` with the gradients of the rows that were read: those of one id are added up first, in their order, as in a
/// table of their own.
fn with_rows(mut table_grad: FlexTensor, ids: &Ids, rows_grad: &FlexTensor) -> FlexTensor {
    let channels = cpu::shape(&table_grad)[1];
    let rows = cpu::values(rows_grad).chunks_exact(channels.max(1));
    let mut sums: HashMap<usize, Vec<f32>> = HashMap::new();
    for (&id, row) in ids.0.iter().zip(rows) {
        simd::add(sums.entry(id).or_insert_with(|| vec![0.0; channels]), row);
    }
    let values = table_grad.storage_mut::<f32>();
    sums.iter().for_each(|(id, sum)| simd::add(&mut values[id * channels..][..channels], sum));
    table_grad
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{agree, leaf, normal, numbers};

    const IDS: [i32; 7] = [3, 0, 3, 4, 3, 0, 1];

    /// The rows, the table's gradient of them, and that with what a tied projection of the rows gives.
    fn run(table: &Tensor<2>, form: fn(Tensor<2>, Tensor<1, Int>) -> Tensor<2>) -> [Vec<f32>; 3] {
        let rows = || form(table.clone(), Tensor::from_ints(IDS, &Device::flex().autodiff()));
        let grad = |out: Tensor<2>| numbers(table.grad(&out.sum().backward()).expect("gradient"));
        let weights = numbers(table.clone().sum_dim(0));
        let weights = Tensor::<1>::from_floats(&weights[..], &table.device()).unsqueeze::<2>();
        let tied = rows().matmul(table.clone().transpose()).tanh();
        [numbers(rows()), grad(rows() * weights), grad(tied)]
    }

    #[test]
    fn fused_agrees_with_burn() {
        let table = leaf([6, 5]);
        let (got, want) = (run(&table, embedding), run(&table, |table, ids| table.select(0, ids)));
        assert!(got == want, "the same bits: {got:?} {want:?}");
        assert_eq!(got[1][2 * 5..3 * 5], [0.0; 5], "a row that was not read");
        let transposed = leaf([5, 6]).transpose();
        let ids = || Tensor::<1, Int>::from_ints(IDS, &Device::flex().autodiff());
        let rows = embedding(transposed.clone(), ids());
        agree("rows of a transposed table", &numbers(rows), &numbers(transposed.select(0, ids())));
    }

    #[test]
    fn a_table_that_is_not_trained_gets_no_gradient() {
        let table = normal([6, 5], &Device::flex().autodiff());
        let ids = Tensor::<1, Int>::from_ints(IDS, &Device::flex().autodiff());
        let scale = leaf([7, 5]);
        let grads = (embedding(table.clone(), ids) * scale.clone()).sum().backward();
        assert!(table.grad(&grads).is_none() && scale.grad(&grads).is_some());
    }

    #[test]
    #[should_panic(expected = "every id must be below the table's rows, 6; there is 6")]
    fn an_id_beyond_the_table_is_refused() {
        embedding(leaf([6, 5]), Tensor::from_ints([1, 6], &Device::flex().autodiff()));
    }
}
