//! Memory that holds no values until they are written: what operations compute in, and what their results are made in.
//!
//! Rust has to be told when all of it is written. Here that is not promised but shown: whoever writes a part gives it back
//! as values (`&mut [f32]`), which safe code can only have got by writing all of it.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Memory for values, none of which can be read before it is written. In tests it is full of NaN.
pub(crate) struct ScratchBuffer(Box<[MaybeUninit<f32>]>);

impl ScratchBuffer {
    pub(crate) fn new(len: usize) -> Self {
        let mut values = Box::new_uninit_slice(len);
        if cfg!(test) {
            values.fill(MaybeUninit::new(f32::NAN));
        }
        Self(values)
    }

    /// All of it, to write to.
    pub(crate) fn unwritten(&mut self) -> &mut [MaybeUninit<f32>] {
        &mut self.0
    }

    /// What was written.
    ///
    /// # Safety
    /// Every value has been written.
    pub(crate) unsafe fn into_values(self) -> Vec<f32> {
        // SAFETY: the caller's promise.
        unsafe { self.0.assume_init() }.into_vec()
    }
}

/// `len` values, which `write` makes in chunks on all threads: it is handed a chunk and the item of `inputs` that belongs to
/// it, and gives the chunk back written, with whatever else it found, which comes back in order.
///
/// # Panics
/// If there is not an input for each chunk, or a chunk is not given back.
pub(crate) fn write_chunks<I, R>(
    len: usize,
    chunk: usize,
    inputs: I,
    write: impl for<'y> Fn(&'y mut [MaybeUninit<f32>], I::Item) -> (&'y mut [f32], R) + Sync,
) -> (Vec<f32>, Vec<R>)
where
    I: IndexedParallelIterator,
    R: Send,
{
    let chunk = chunk.max(1);
    assert_eq!(inputs.len(), len.div_ceil(chunk), "an input for each chunk of {chunk} of {len} values");
    let mut buffer = ScratchBuffer::new(len);
    let parts = buffer.unwritten().par_chunks_mut(chunk).zip(inputs);
    let found = parts.map(|(part, input)| {
        let place = (part.as_ptr().cast::<f32>(), part.len());
        let (written, found) = write(part, input);
        assert!((written.as_ptr(), written.len()) == place, "a chunk was not written");
        found
    });
    let found = found.collect();
    // SAFETY: the chunks cover the buffer, and each came back as values.
    (unsafe { buffer.into_values() }, found)
}

/// Twice `len` values, which `write` makes in chunks of both; else as [`write_chunks`].
///
/// # Panics
/// If there is not an input for each chunk, or a chunk is not given back.
pub(crate) fn write_two_in_chunks<I: IndexedParallelIterator>(
    len: usize,
    chunk: usize,
    inputs: I,
    write: impl for<'y, 'z> Fn(
        &'y mut [MaybeUninit<f32>],
        &'z mut [MaybeUninit<f32>],
        I::Item,
    ) -> (&'y mut [f32], &'z mut [f32])
    + Sync,
) -> [Vec<f32>; 2] {
    let mut other = ScratchBuffer::new(len);
    let inputs = other.unwritten().par_chunks_mut(chunk.max(1)).zip(inputs);
    let (first, _) = write_chunks(len, chunk, inputs, |part, (second, input)| {
        let place = (second.as_ptr().cast::<f32>(), second.len());
        let (written, of_second) = write(part, second, input);
        assert!((of_second.as_ptr(), of_second.len()) == place, "a chunk was not written");
        (written, ())
    });
    // SAFETY: `write_chunks` has seen to it that there was an item for each chunk, and each part came back as values.
    [first, unsafe { other.into_values() }]
}

/// Writes `part` row by row: `write` is handed each row with its index and gives it back written.
///
/// # Panics
/// If a row is not given back.
pub(crate) fn write_rows<'y>(
    part: &'y mut [MaybeUninit<f32>],
    width: usize,
    mut write: impl for<'r> FnMut(usize, &'r mut [MaybeUninit<f32>]) -> &'r mut [f32],
) -> &'y mut [f32] {
    for (index, row) in part.chunks_mut(width.max(1)).enumerate() {
        let place = (row.as_ptr().cast::<f32>(), row.len());
        let written = write(index, row);
        assert!((written.as_ptr(), written.len()) == place, "a row was not written");
    }
    // SAFETY: the rows cover the part, and each came back as values.
    unsafe { part.assume_init_mut() }
}

/// Fills `part` with zeros.
pub(crate) fn write_zeros(part: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    part.fill(MaybeUninit::new(0.0));
    // SAFETY: every value was just written.
    unsafe { part.assume_init_mut() }
}

/// Memory that tasks write to at places of their own, which no slice could tell apart.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    memory: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: as good as the `&mut [T]` that it is made of; that its parts do not overlap is what `part` asks for.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above: nothing is read or written through the handle itself.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// A handle on `memory`, which nobody else can reach while it lives.
    pub(crate) fn new(memory: &'a mut [T]) -> Self {
        Self { start: memory.as_mut_ptr(), len: memory.len(), memory: std::marker::PhantomData }
    }

    /// Where `memory[at]` is, and how many values follow.
    pub(crate) fn from(&self, at: usize) -> (*mut T, usize) {
        assert!(at <= self.len, "place {at} of {} values", self.len);
        // SAFETY: inside of the memory, or right behind it.
        (unsafe { self.start.add(at) }, self.len - at)
    }

    /// `memory[at..at + len]`.
    ///
    /// # Safety
    /// As long as it lives, nobody else reads or writes there.
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &'a mut [T] {
        let (start, rest) = self.from(at);
        assert!(len <= rest, "{len} values at {at} of {}", self.len);
        // SAFETY: inside of the memory, which lives for 'a, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_written_in_order_with_what_was_found() {
        let inputs = [1.0f32, 2.0, 3.0];
        let (values, found) = write_chunks(5, 2, inputs.par_iter(), |part, &input| {
            let len = part.len();
            let written = write_zeros(part);
            written.fill(input);
            (written, len)
        });
        assert_eq!((values, found), (vec![1.0, 1.0, 2.0, 2.0, 3.0], vec![2, 2, 1]));
        let none: [f32; 0] = [];
        assert_eq!(write_chunks(0, 0, none.par_iter(), |part, _| (write_zeros(part), ())).0, none);
    }

    #[test]
    #[should_panic(expected = "a chunk was not written")]
    fn a_chunk_that_is_not_given_back_is_noticed() {
        write_chunks(4, 2, [0, 1].par_iter(), |_, _| (Default::default(), ()));
    }

    #[test]
    #[should_panic(expected = "a row was not written")]
    fn a_row_of_which_a_part_is_given_back_is_noticed() {
        let mut buffer = ScratchBuffer::new(6);
        write_rows(buffer.unwritten(), 3, |_, row| write_zeros(&mut row[..2]));
    }
}
