//! `CONFORMANCE.md` has a row for every requirement, and the tests that it and `defects.rs` name exist.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The sections of the table, and how many requirements each has.
const SECTIONS: [(&str, u32); 7] = [
    ("GEN", 36),
    ("VQ", 29),
    ("MMIO", 19),
    ("PCI", 22),
    ("BLK", 21),
    ("NET", 31),
    ("GPU", 11),
];

fn crate_path(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Returns the rows by their ID: the cell that says what holds them.
fn rows() -> BTreeMap<String, String> {
    let table = std::fs::read_to_string(crate_path("CONFORMANCE.md")).unwrap();
    let mut rows = BTreeMap::new();
    for line in table.lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let ["", id, section, level, asked, held, ""] = cells[..] else {
            continue;
        };
        if !id.contains('-') || id.starts_with('-') {
            continue;
        }
        assert!(
            !section.is_empty() && !level.is_empty() && !asked.is_empty(),
            "{id}"
        );
        let before = rows.insert(id.to_owned(), held.to_owned());
        assert_eq!(before, None, "{id} has two rows");
    }
    rows
}

/// Returns the names in backticks of a cell that names tests, or `None` for one that says why there is none.
fn tests_of(held: &str) -> Option<Vec<&str>> {
    let names = held.split("<br>").map(|name| {
        let name = name.strip_prefix('`')?.strip_suffix('`')?;
        (!name.contains('`')).then_some(name)
    });
    names.collect()
}

/// Returns the names of all tests below a directory of this crate.
fn tests_below(directory: &Path, tests: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            tests_below(&path, tests);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = std::fs::read_to_string(&path).unwrap();
            let mut is_test = false;
            for line in source.lines().map(str::trim) {
                if line == "#[test]" {
                    is_test = true;
                } else if let Some(function) = line.strip_prefix("fn ") {
                    let name = function.split(['(', '<']).next().unwrap_or_default();
                    if std::mem::take(&mut is_test) {
                        tests.insert(name.to_owned());
                    }
                }
            }
        }
    }
}

fn tests() -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    tests_below(&crate_path("tests"), &mut tests);
    tests_below(&crate_path("src"), &mut tests);
    tests
}

#[test]
fn every_requirement_has_a_row_and_no_row_is_of_another() {
    let expected: BTreeSet<String> = SECTIONS
        .iter()
        .flat_map(|(section, count)| (1..=*count).map(move |row| format!("{section}-{row:02}")))
        .collect();
    assert_eq!(expected.len(), 169);
    let found: BTreeSet<String> = rows().into_keys().collect();
    assert_eq!(found, expected);
}

#[test]
fn every_row_names_tests_that_exist_or_says_why_there_is_none() {
    let tests = tests();
    for (id, held) in rows() {
        if let Some(names) = tests_of(&held) {
            for name in names {
                assert!(tests.contains(name), "{id}: there is no test `{name}`");
            }
        } else {
            let reason = held
                .strip_prefix("does not apply: ")
                .or_else(|| held.strip_prefix("holds, without a test: "));
            assert!(
                reason.is_some_and(|reason| reason.len() > 10),
                "{id}: {held}"
            );
        }
    }
}

#[test]
fn every_test_of_a_requirement_is_in_its_row() {
    let rows = rows();
    let mut count = 0;
    for test in tests() {
        for (section, _) in SECTIONS {
            let prefix = format!("{}_", section.to_lowercase());
            let Some(number) = test.strip_prefix(&prefix).and_then(|rest| rest.get(..2)) else {
                continue;
            };
            let Some(held) = rows.get(&format!("{section}-{number}")) else {
                continue;
            };
            let named = tests_of(held).is_some_and(|names| names.contains(&test.as_str()));
            assert!(named, "{section}-{number} does not name `{test}`");
            count += 1;
        }
    }
    assert!(count > 130, "{count} tests of requirements");
}

#[test]
fn the_tests_of_faults_that_are_elsewhere_exist() {
    let mut tests = tests();
    for sibling in ["base", "block", "display", "net"] {
        let directory = crate_path(&format!("../axdriver_{sibling}/src"));
        if !directory.exists() {
            // This crate is alone, as it is published.
            return;
        }
        tests_below(&directory, &mut tests);
    }
    let defects = std::fs::read_to_string(crate_path("tests/defects.rs")).unwrap();
    let header = defects.lines().take_while(|line| line.starts_with("//!"));
    let header: Vec<_> = header.collect();
    let mut count = 0;
    for name in header.join(" ").split('`').skip(1).step_by(2) {
        // Names of tests are sentences.
        if name.matches('_').count() >= 3 {
            assert!(tests.contains(name), "there is no test `{name}`");
            count += 1;
        }
    }
    assert!(count >= 9, "{count}");
}
