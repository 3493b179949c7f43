//! `afterimage-mutants`: breaks production code on purpose, one way after another, and runs seeds until each is caught.
//!
//! All mutations of `mutants.toml` are built into one copy of the tree, each behind a switch in the environment, so
//! that there is one build and not forty.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use serde::Deserialize;

/// The environment variable that switches a mutation on.
const SWITCH: &str = "AFTERIMAGE_MUTANT";

/// Breaks production code on purpose and runs seeds until each mutation is caught.
#[derive(Debug, Parser)]
#[command(name = "afterimage-mutants")]
struct Args {
    /// No more seeds than this for each.
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,
    /// No more seconds than this for each.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Worlds at once.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Only these.
    #[arg(long)]
    only: Vec<String>,
    /// Only look whether every mutation still has its place.
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

#[derive(Debug, Deserialize)]
struct Mutant {
    name: String,
    file: PathBuf,
    find: String,
    instead: String,
    breaks: String,
    #[serde(default)]
    kind: Kind,
}

/// What `find` is, where that is not plain.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// Statements if it ends like one, else an expression.
    #[default]
    Plain,
    /// An expression and the comma after it: the end of a match arm.
    Arm,
}

impl Mutant {
    /// `find` with the mutation behind its switch.
    fn switched(&self) -> String {
        let Self { name, find, instead, .. } = self;
        let on = format!("std::env::var_os(\"{SWITCH}\").is_some_and(|mutant| mutant == \"{name}\")");
        if self.kind == Kind::Arm {
            let (find, instead) = (find.trim_end_matches(','), instead.trim_end_matches(','));
            return format!("(if {on} {{ {instead} }} else {{ {find} }}),");
        }
        if find.ends_with(';') {
            return format!("if {on} {{ {instead} }} else {{ {find} }}");
        }
        format!("(if {on} {{ {instead} }} else {{ {find} }})")
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("mutants.toml");
    let list: List = toml::from_str(&std::fs::read_to_string(list)?)?;
    let changed = mutated(&root, &list.mutant)?;
    println!("{} mutations in {} files, each in its place", list.mutant.len(), changed.len());
    if args.check {
        return Ok(());
    }
    let work = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root.join("target"), PathBuf::from)
        .join("mutants");
    let tree = work.join("tree");
    copy_tree(&root, &tree, &changed)?;
    let program = build(&tree, &work.join("build"))?;
    let calm = try_one(&program, "none", &args, args.seeds.min(200))?;
    ensure!(calm.caught.is_none(), "the code as it is fails: {}", calm.caught.unwrap_or_default());
    let mut survived = Vec::new();
    println!("| mutation | breaks | caught by seed | after worlds | in s |\n|---|---|---|---|---|");
    for mutant in list.mutant.iter().filter(|mutant| args.only.is_empty() || args.only.contains(&mutant.name))
    {
        let tried = try_one(&program, &mutant.name, &args, args.seeds)?;
        let seed = tried.caught.as_deref().map_or("**survived**", |what| {
            what.trim_start_matches("Error: seed ").split(':').next().unwrap_or(what)
        });
        println!(
            "| {} | {} | {} | {} | {:.1} |",
            mutant.name,
            mutant.breaks,
            seed,
            tried.worlds,
            tried.took.as_secs_f64()
        );
        if let Some(what) = tried.caught {
            eprintln!("{}: {}", mutant.name, what.trim_start_matches("Error: "));
        } else {
            survived.push(mutant.name.as_str());
        }
    }
    ensure!(survived.is_empty(), "not caught: {}", survived.join(", "));
    Ok(())
}

/// The files with all mutations in them; an error if one has lost its place.
fn mutated(root: &Path, mutants: &[Mutant]) -> anyhow::Result<BTreeMap<PathBuf, String>> {
    let mut files = BTreeMap::new();
    for mutant in mutants {
        if !files.contains_key(&mutant.file) {
            let source = std::fs::read_to_string(root.join(&mutant.file));
            files.insert(mutant.file.clone(), source.with_context(|| mutant.file.display().to_string())?);
        }
        let Some(source) = files.get_mut(&mutant.file) else { continue };
        let places = source.matches(&mutant.find).count();
        if places != 1 {
            bail!("{}: its text is {places} times in {}", mutant.name, mutant.file.display());
        }
        *source = source.replacen(&mutant.find, &mutant.switched(), 1);
    }
    Ok(files)
}

/// Copies what git knows; a file that is what it was keeps its time, so that it is not built again.
fn copy_tree(root: &Path, tree: &Path, changed: &BTreeMap<PathBuf, String>) -> anyhow::Result<()> {
    let known = Command::new("git")
        .args(["ls-files", "-z", "-co", "--exclude-standard"])
        .current_dir(root)
        .output()?;
    ensure!(known.status.success(), "git cannot list the files of {}", root.display());
    for name in String::from_utf8(known.stdout)?.split_terminator('\0') {
        let (from, to) = (root.join(name), tree.join(name));
        if !from.is_file() {
            continue;
        }
        let bytes = match changed.get(Path::new(name)) {
            Some(source) => source.clone().into_bytes(),
            None => std::fs::read(&from)?,
        };
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        std::fs::create_dir_all(to.parent().unwrap_or(tree))?;
        std::fs::write(&to, bytes)?;
    }
    Ok(())
}

fn build(tree: &Path, target: &Path) -> anyhow::Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "-p", "afterimage-simulate", "--bin", "afterimage-simulate"])
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", target)
        // The switches have parentheses that nobody needs.
        .env("RUSTFLAGS", "-Awarnings")
        .status()?;
    ensure!(built.success(), "the mutated tree does not build");
    Ok(target.join("debug/afterimage-simulate"))
}

struct Tried {
    caught: Option<String>,
    worlds: String,
    took: Duration,
}

fn try_one(program: &Path, mutant: &str, args: &Args, seeds: u64) -> anyhow::Result<Tried> {
    let began = Instant::now();
    let ran = Command::new(program)
        .args(["--seeds", &format!("0..{seeds}"), "--seconds", &args.seconds.to_string()])
        .args(["--threads", &args.threads.to_string()])
        .env(SWITCH, mutant)
        .output()?;
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    let worlds = out.split_whitespace().next().unwrap_or("?").to_owned();
    let caught = (!ran.status.success()).then(|| err.lines().next().unwrap_or("it died").to_owned());
    Ok(Tried { caught, worlds, took: began.elapsed() })
}
