//! One line of the result.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What was measured, on both sides where there are two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) softkvm: Option<f64>,
    pub(crate) tcg: Option<f64>,
}

impl Row {
    pub(crate) fn new(name: &str, unit: &str, softkvm: Option<f64>, tcg: Option<f64>) -> Self {
        Self { name: name.to_owned(), unit: unit.to_owned(), softkvm, tcg }
    }
}

pub(crate) fn print_json(rows: &[Row]) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(rows).context("numbers print as JSON")?);
    Ok(())
}

pub(crate) fn print_table(rows: &[Row]) {
    let cell = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
    println!("{:<44} {:>12} {:>12}  unit", "", "softkvm", "qemu tcg");
    for row in rows {
        println!("{:<44} {:>12} {:>12}  {}", row.name, cell(row.softkvm), cell(row.tcg), row.unit);
    }
}
