//! Pages that Zstandard packed, unpacked in pure Rust: the library's own way goes through a C library. The library reads them as if
//! they were not packed, and each is unpacked before anything looks into it.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::bloom_filter::Sbbf;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::reader::RowGroupReader;
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use crate::files::packed::Zstandard;

/// A row group, some columns of which may be packed by Zstandard.
pub(super) struct Unpacking<'a> {
    pub(super) file: Arc<File>,
    pub(super) group: Box<dyn RowGroupReader + 'a>,
}

impl RowGroupReader for Unpacking<'_> {
    fn metadata(&self) -> &RowGroupMetaData {
        self.group.metadata()
    }

    fn num_columns(&self) -> usize {
        self.group.num_columns()
    }

    fn get_column_page_reader(&self, at: usize) -> Result<Box<dyn PageReader>> {
        let column = self.metadata().column(at);
        if !matches!(column.compression(), Compression::ZSTD(_)) {
            return self.group.get_column_page_reader(at);
        }
        let as_it_is = column.clone().into_builder().set_compression(Compression::UNCOMPRESSED).build()?;
        let rows = usize::try_from(self.metadata().num_rows())?;
        let pages = SerializedPageReader::new(self.file.clone(), &as_it_is, rows, None)?;
        Ok(Box::new(Pages { pages, most: u64::try_from(column.uncompressed_size())? }))
    }

    fn get_column_bloom_filter(&self, at: usize) -> Option<&Sbbf> {
        self.group.get_column_bloom_filter(at)
    }

    fn get_row_iter(&self, projection: Option<Type>) -> Result<RowIter<'_>> {
        RowIter::from_row_group(projection, self)
    }
}

/// The pages of a column.
struct Pages {
    pages: SerializedPageReader<File>,
    /// Bytes that all of them have unpacked.
    most: u64,
}

impl Pages {
    fn unpacked(&self, page: Page) -> Result<Page> {
        Ok(match page {
            Page::DataPage { buf, num_values, encoding, def_level_encoding, rep_level_encoding, statistics } => {
                let buf = unpack(&buf, 0, self.most)?.into();
                Page::DataPage { buf, num_values, encoding, def_level_encoding, rep_level_encoding, statistics }
            }
            Page::DictionaryPage { buf, num_values, encoding, is_sorted } => {
                Page::DictionaryPage { buf: unpack(&buf, 0, self.most)?.into(), num_values, encoding, is_sorted }
            }
            Page::DataPageV2 {
                buf,
                num_values,
                encoding,
                num_nulls,
                num_rows,
                def_levels_byte_len,
                rep_levels_byte_len,
                is_compressed: true,
                statistics,
            } => {
                // Levels come first, and are never packed.
                let levels = def_levels_byte_len as usize + rep_levels_byte_len as usize;
                Page::DataPageV2 {
                    buf: unpack(&buf, levels, self.most)?.into(),
                    num_values,
                    encoding,
                    num_nulls,
                    num_rows,
                    def_levels_byte_len,
                    rep_levels_byte_len,
                    is_compressed: false,
                    statistics,
                }
            }
            plain => plain,
        })
    }
}

/// A page whose bytes from `start` on are packed.
fn unpack(page: &[u8], start: usize, most: u64) -> Result<Vec<u8>> {
    let wrong = |cause: &dyn std::fmt::Display| ParquetError::General(format!("a page cannot be unpacked ({cause})"));
    let (levels, packed) = page.split_at_checked(start).ok_or_else(|| wrong(&"it is shorter than its levels"))?;
    let mut unpacked = levels.to_vec();
    // A page without values has none to unpack.
    if !packed.is_empty() {
        Zstandard::new(packed).take(most + 1).read_to_end(&mut unpacked).map_err(|cause| wrong(&cause))?;
    }
    match unpacked.len() as u64 > most {
        true => Err(wrong(&format!("it has more than the {most} bytes of its column"))),
        false => Ok(unpacked),
    }
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        self.pages.get_next_page()?.map(|page| self.unpacked(page)).transpose()
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }
}
