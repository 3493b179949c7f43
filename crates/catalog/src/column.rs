//! Columns that hold more than SQLite knows: text that is parsed, values as JSON.

use std::str::FromStr;

use rusqlite::types::Type;
use rusqlite::{Error, Result, Row};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A value as the text of a JSON column.
///
/// # Panics
/// For what JSON cannot hold (maps whose keys are no text): such types do not belong into a column.
pub fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain values can be written as JSON")
}

/// The value of a JSON column.
pub fn json<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> Result<T> {
    converted(row, column, |text| serde_json::from_str(text))
}

/// The value of a column whose text is parsed: an id, a name.
pub fn parsed<T>(row: &Row<'_>, column: usize) -> Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    converted(row, column, str::parse)
}

fn converted<T, E: std::error::Error + Send + Sync + 'static>(
    row: &Row<'_>,
    column: usize,
    convert: impl FnOnce(&str) -> std::result::Result<T, E>,
) -> Result<T> {
    let text: String = row.get(column)?;
    convert(&text).map_err(|error| Error::FromSqlConversionFailure(column, Type::Text, Box::new(error)))
}
