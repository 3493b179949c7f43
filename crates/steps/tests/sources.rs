//! Holds the list of steps against the sources, and the sources against the rule: whatever makes something
//! durable has a step right before it and right after it.
//!
//! The check reads the sources (with `syn`) and walks each function in the order in which it is written: between
//! two operations there must be a step, and one before the first and after the last. An operation is a call by
//! one of the names in [`OPERATIONS`]; a function that itself consists of operations and is called as one is in
//! [`HELPERS`], and its calls are held to the rule instead of its body. What this cannot see: the order of
//! things in branches and loops, operations under names that it does not know, and other crates' insides.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// What makes something durable, wherever it is called.
const OPERATIONS: &[&str] = &["sync_all", "sync_data", "sync_dir", "sync_folder", "rename"];

/// Crate, function: its body is made of operations, its calls count as one.
const HELPERS: &[(&str, &str)] = &[
    ("primary", "save"),
    ("primary", "save_measured"),
    ("primary", "save_new"),
    ("replica", "commit"),
    ("replica", "commit_row"),
    ("replica", "copy_sparse"),
    ("replica", "describe"),
    ("replica", "describe_row"),
    ("replica", "sync"),
    ("repository", "make_durable"),
    ("site", "write_new"),
    ("wire", "rename"),
    ("wire", "sync_dir"),
    ("wire", "write_new"),
];

/// Crate, function, and why it needs no steps of its own.
const EXEMPT: &[(&str, &str, &str)] = &[
    (
        "primary",
        "save_blocking",
        "no site runs, and it only asks for a compare before anything is written over",
    ),
    ("replica", "replace", "`describe` calls it, and its calls are held to the rule"),
    ("replica", "rebuild_all_in", "no command calls it yet, so no process can come to it"),
    ("replica", "rebuild_vm", "no command calls it yet, so no process can come to it"),
    ("replica", "renew", "no command calls it yet, so no process can come to it"),
    ("site", "keep", "what came of a boot check is told, and nothing rests on it"),
    ("site", "note", "what happened is told, and nothing rests on it"),
    ("wire", "put_aside", "what lies there was of no use before, and is of none afterwards"),
];

/// The crates that are held to the rule.
const CRATES: &[&str] = &["catalog", "primary", "replica", "repository", "site", "wire"];

#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Step(String),
    Operation(String),
}

/// A function, and what it does in order.
struct Function {
    place: String,
    name: String,
    events: Vec<(usize, Event)>,
}

struct Reader<'a> {
    krate: &'a str,
    file: String,
    functions: Vec<Function>,
    open: Vec<Function>,
}

impl Reader<'_> {
    fn note(&mut self, span: proc_macro2::Span, event: Event) {
        if let Some(function) = self.open.last_mut() {
            function.events.push((span.start().line, event));
        }
    }

    fn is_operation(&self, name: &str) -> bool {
        OPERATIONS.contains(&name) || HELPERS.contains(&(self.krate, name))
    }

    fn function(&mut self, name: &syn::Ident, body: impl FnOnce(&mut Self)) {
        let (name, line) = (name.to_string(), name.span().start().line);
        self.open.push(Function { place: format!("{}:{line}", self.file), name, events: Vec::new() });
        body(self);
        self.functions.extend(self.open.pop());
    }
}

fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().segments.last().is_some_and(|last| last.ident == "test")
            || (attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Ident>().is_ok_and(|what| what == "test"))
    })
}

/// A change of the catalog: `write` or `change` with a closure that is given a transaction.
fn is_change(call: &syn::ExprMethodCall) -> bool {
    let name = call.method == "write" || call.method == "change";
    let takes_transaction = |argument: &syn::Expr| match argument {
        syn::Expr::Closure(closure) => closure.inputs.len() == 1 && closure.capture.is_some(),
        _ => false,
    };
    name && call.args.len() == 1 && call.args.iter().all(takes_transaction)
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            self.function(&item.sig.ident, |reader| visit::visit_item_fn(reader, item));
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig.ident, |reader| visit::visit_impl_item_fn(reader, item));
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        self.function(&item.sig.ident, |reader| visit::visit_trait_item_fn(reader, item));
    }

    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        let syn::Expr::Path(path) = &*call.func else { return visit::visit_expr_call(self, call) };
        let Some(last) = path.path.segments.last() else { return };
        let (name, span) = (last.ident.to_string(), last.ident.span());
        call.args.iter().for_each(|argument| self.visit_expr(argument));
        if name == "durable_step" {
            let Some(syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. })) = call.args.first()
            else {
                panic!("{}: a step's name must be written out", self.file)
            };
            self.note(span, Event::Step(text.value()));
        } else if self.is_operation(&name) {
            self.note(span, Event::Operation(name));
        }
    }

    fn visit_expr_path(&mut self, path: &'ast syn::ExprPath) {
        // A function that is handed on, as in `map_or(Ok(()), sync_folder)`.
        if let Some(last) = path.path.segments.last()
            && last.ident == "sync_folder"
        {
            self.note(last.ident.span(), Event::Operation(last.ident.to_string()));
        }
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        visit::visit_expr_method_call(self, call);
        let name = call.method.to_string();
        if is_change(call) || self.is_operation(&name) {
            self.note(call.method.span(), Event::Operation(name));
        }
    }
}

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
}

fn functions_of(krate: &str) -> Vec<Function> {
    let mut files = Vec::new();
    rust_files(&crates().join(krate).join("src"), &mut files);
    let mut functions = Vec::new();
    for path in files {
        let is_tests = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
        if is_tests {
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let parsed = syn::parse_file(&source).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = path.strip_prefix(crates()).unwrap().display().to_string();
        let mut reader = Reader { krate, file, functions: Vec::new(), open: Vec::new() };
        reader.visit_file(&parsed);
        functions.extend(reader.functions);
    }
    functions
}

fn all_crates() -> Vec<String> {
    let entries = std::fs::read_dir(crates()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_list_has_every_step_of_the_sources_and_no_other() {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for krate in all_crates().iter().filter(|krate| *krate != "steps") {
        for function in functions_of(krate) {
            for (line, event) in function.events {
                if let Event::Step(name) = event {
                    assert!(
                        name.starts_with(&format!("{krate}::")),
                        "{}: step {name} must begin with its crate's name",
                        function.place
                    );
                    found.entry(name).or_default().push(format!("{} (line {line})", function.place));
                }
            }
        }
    }
    for (name, places) in &found {
        assert_eq!(places.len(), 1, "step {name} is in several places: {places:?}");
    }
    let found: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    let listed: BTreeSet<&str> = steps::ALL.iter().copied().collect();
    let missing: Vec<_> = found.difference(&listed).collect();
    let gone: Vec<_> = listed.difference(&found).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "crates/steps/src/all.rs lacks {missing:#?} and lists {gone:#?}, which are in no source"
    );
}

/// What breaks the rule in one function's events.
fn violations(function: &Function) -> Vec<String> {
    let mut broken = Vec::new();
    let is_step = |place: Option<&(usize, Event)>| matches!(place, Some((_, Event::Step(_))));
    for (place, (line, event)) in function.events.iter().enumerate() {
        let Event::Operation(name) = event else { continue };
        let before = place.checked_sub(1).and_then(|before| function.events.get(before));
        let after = function.events.get(place + 1);
        for (side, neighbour) in [("before", before), ("after", after)] {
            if !is_step(neighbour) {
                let Function { place, name: function, .. } = function;
                broken.push(format!("{place} {function}: no step {side} `{name}` in line {line}"));
            }
        }
    }
    broken
}

#[test]
fn whatever_is_made_durable_has_a_step_on_either_side() {
    let mut broken = Vec::new();
    let mut excused = BTreeSet::new();
    let mut operations = 0;
    for krate in CRATES {
        for function in functions_of(krate) {
            let name = function.name.as_str();
            if OPERATIONS.contains(&name) || HELPERS.contains(&(krate, name)) {
                continue; // its calls are held to the rule instead
            }
            operations +=
                function.events.iter().filter(|(_, event)| matches!(event, Event::Operation(_))).count();
            let found = violations(&function);
            match EXEMPT.iter().find(|(of, name, _)| of == krate && *name == function.name) {
                Some(exempt) if !found.is_empty() => drop(excused.insert(exempt)),
                _ => broken.extend(found),
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    let idle: Vec<_> = EXEMPT.iter().filter(|exempt| !excused.contains(exempt)).collect();
    assert!(idle.is_empty(), "exempt without need: {idle:?}");
    assert!(operations > 40, "only {operations} operations were found: the check no longer sees them");
}

#[test]
fn the_check_sees_what_breaks_the_rule() {
    let read = |source: &str| {
        let parsed = syn::parse_file(source).unwrap();
        let mut reader =
            Reader { krate: "replica", file: "x.rs".into(), functions: Vec::new(), open: Vec::new() };
        reader.visit_file(&parsed);
        reader.functions.iter().map(|function| violations(function).len()).sum::<usize>()
    };
    let step = r#"durable_step("replica::x");"#;
    for (body, broken) in [
        (format!("{step} file.sync_all()?; {step}"), 0),
        (format!("{step} file.sync_all()?;"), 1),
        (format!("file.sync_all()?; {step}"), 1),
        (format!("{step} fs::rename(a, b)?; sync_folder(c)?; {step}"), 2),
        (format!("{step} fs::rename(a, b)?; {step} sync_folder(c)?; {step}"), 0),
        (format!("{step} path.parent().map_or(Ok(()), sync_folder)?; {step}"), 0),
        ("path.parent().map_or(Ok(()), sync_folder)?;".into(), 2),
        ("self.catalog().write(move |tx| tx.execute(\"\", []))?;".into(), 2),
        (format!("{step} self.commit_row(&mut state, row)?; {step}"), 0),
        ("file.write(bytes)?;".into(), 0),
    ] {
        assert_eq!(read(&format!("fn f() {{ {body} }}")), broken, "{body}");
    }
    assert_eq!(read("#[cfg(test)] mod tests { fn f() { file.sync_all(); } }"), 0);
}
