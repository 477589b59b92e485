//! The folder of resources as it stands. A bad file is refused, and what it last said well stays.

mod together;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use std::{fs, io};

use sheetbend_control_plane_client::model::ServiceName;
use sheetbend_control_plane_client::model::jwt::read_keys;

use super::parse::{MAX_FILE, Parsed, Problem, parse};
use super::{KeyFile, Resource, Settings};

/// More files than this are not read.
const MAX_FILES: usize = 2_000;
/// Folders in folders in folders: deeper is a loop.
const MAX_DEPTH: usize = 8;
/// A file that is empty, or a folder without any, is believed after this long: it may be about to be written.
const SETTLES: Duration = Duration::from_secs(1);

/// A file that is gone is believed to be after this long: an editor may be about to write it anew.
pub(crate) const GONE: Duration = Duration::from_millis(30);

/// What is known of one file.
#[derive(Debug, Default)]
pub(crate) struct FileState {
    seen: Option<Stamp>,
    /// The last good content, with the line of each resource.
    good: Vec<(u64, Resource)>,
    problems: Vec<Problem>,
    /// Services that stand where something is wrong.
    unread: Vec<ServiceName>,
    /// Files with keys that it names, as they were when they were read.
    beside: Vec<(PathBuf, Option<Stamp>)>,
    /// When it was first seen without the resources that it had.
    emptied: Option<Instant>,
}

impl FileState {
    /// Something is wrong with it, and it never was good.
    fn is_unknown(&self) -> bool {
        !self.problems.is_empty() && self.good.is_empty()
    }

    /// It was read as it is.
    fn is_known(&self, stamp: &Stamp) -> bool {
        self.seen.as_ref() == Some(stamp) && self.beside.iter().all(|(path, then)| Stamp::at(path) == *then)
    }

    /// The resources that count.
    pub(crate) fn resources(&self) -> impl Iterator<Item = &Resource> {
        self.good.iter().map(|(_, resource)| resource)
    }

    /// Why the file as it is now does not count; nothing where it does.
    pub(crate) fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// A file as it is now.
#[derive(Debug, Default)]
struct Looked {
    parsed: Parsed,
    beside: Vec<(PathBuf, Option<Stamp>)>,
}

/// Enough to see that a file is another one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    size: u64,
    inode: u64,
}

impl Stamp {
    fn at(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|meta| Self::of(&meta))
    }

    fn of(meta: &fs::Metadata) -> Self {
        Self { modified: meta.modified().ok(), size: meta.len(), inode: meta.ino() }
    }
}

/// A folder of resources.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// The CA's, where that is known.
    trust_domain: Option<String>,
    files: BTreeMap<PathBuf, FileState>,
    /// What is good in a file counts, whatever else is in it.
    piecemeal: bool,
    /// When it was first seen without the files that it had.
    emptied: Option<Instant>,
    /// A file has just gone.
    waits: bool,
}

impl Folder {
    pub(crate) fn new(path: PathBuf, trust_domain: &str) -> Self {
        Self::of(path, Some(trust_domain), false)
    }

    /// A folder that is only looked at: what is good in a file with mistakes is held against the rest too.
    pub(crate) fn looked_at(path: PathBuf, trust_domain: Option<&str>) -> Self {
        Self::of(path, trust_domain, true)
    }

    fn of(path: PathBuf, trust_domain: Option<&str>, piecemeal: bool) -> Self {
        let trust_domain = trust_domain.map(str::to_string);
        Self { path, trust_domain, files: BTreeMap::new(), piecemeal, emptied: None, waits: false }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn files(&self) -> &BTreeMap<PathBuf, FileState> {
        &self.files
    }

    pub(crate) fn resources(&self) -> impl Iterator<Item = &Resource> {
        self.files.values().flat_map(FileState::resources)
    }

    /// The resources that count, with file and line.
    pub(crate) fn placed(&self) -> impl Iterator<Item = (&Path, u64, &Resource)> {
        self.files.iter().flat_map(|(path, state)| state.good.iter().map(move |(at, r)| (path.as_path(), *at, r)))
    }

    /// Services that stand in documents with mistakes.
    pub(crate) fn unread(&self) -> impl Iterator<Item = &ServiceName> {
        self.files.values().flat_map(|state| &state.unread)
    }

    /// Reads whatever changed. Gives whether the resources that count are others now, and the new problems.
    pub(crate) fn reload(&mut self, now: Instant) -> io::Result<(bool, Vec<Problem>)> {
        let mut found = BTreeMap::new();
        match self.path.is_file() {
            true => drop(found.insert(self.path.clone(), Stamp::of(&fs::metadata(&self.path)?))),
            false => collect(&self.path, MAX_DEPTH, &mut found)?,
        }
        if found.is_empty() && !self.files.is_empty() {
            if now < *self.emptied.get_or_insert(now) + SETTLES {
                return Ok((false, Vec::new()));
            }
        } else {
            self.emptied = None;
        }
        let left_out = found.keys().nth(MAX_FILES).cloned().map(|first| found.split_off(&first));
        let is_there = |path: &PathBuf| found.contains_key(path) || left_out.iter().any(|l| l.contains_key(path));
        let (files, gone) = std::mem::take(&mut self.files).into_iter().partition(|(path, _)| is_there(path));
        self.files = files;
        // A duplicate is one only as long as its twin is there: look at refused files again whenever something moved.
        let moved = !gone.is_empty()
            || found.iter().any(|(path, stamp)| !self.files.get(path).is_some_and(|file| file.is_known(stamp)));
        let looked_at = found.into_iter().filter_map(|(path, stamp)| self.look(path, stamp, moved, now)).collect();
        let (mut changed, mut news) = self.take(looked_at);
        changed |= self.let_go(gone, now, &mut news);
        if let Some((first, others)) = left_out.iter().find_map(|left| Some((left.keys().next()?, left.len() - 1))) {
            let reason = format!("not read, as {others} others are not: {MAX_FILES} files are read at most");
            let hint = Some("put several resources into one file, with `---` between them".to_string());
            let problem = Problem { file: first.clone(), line: 1, column: 1, reason, hint };
            let state = self.files.entry(first.clone()).or_default();
            news.extend((!state.problems.contains(&problem)).then(|| problem.clone()));
            state.problems = vec![problem];
        }
        Ok((changed, news))
    }

    /// Reads a file that is another one than it was; or was refused, where something moved.
    fn look(&mut self, path: PathBuf, stamp: Stamp, moved: bool, now: Instant) -> Option<(PathBuf, Looked)> {
        let state = self.files.entry(path.clone()).or_default();
        if state.is_known(&stamp) {
            state.emptied = None;
            if !moved || state.problems.is_empty() {
                return None;
            }
        }
        state.seen = Some(stamp);
        let mut parsed = match read(&path) {
            Ok(text) => parse(&path, &text),
            Err(problem) => Parsed { problems: vec![problem], ..Parsed::default() },
        };
        let emptied = parsed.problems.is_empty() && parsed.resources.is_empty() && !state.good.is_empty();
        if emptied && now < *state.emptied.get_or_insert(now) + SETTLES {
            state.seen = None;
            return None;
        }
        state.emptied = None;
        let beside = read_keys_beside(&path, &mut parsed);
        parsed.problems.extend(self.of_another_domain(&path, &parsed.resources));
        Some((path, Looked { parsed, beside }))
    }

    /// Makes what is good count. Gives whether the resources that count are others now, and the new problems.
    fn take(&mut self, mut looked_at: BTreeMap<PathBuf, Looked>) -> (bool, Vec<Problem>) {
        let refused = self.beside_others(&looked_at);
        let (mut changed, mut news) = (false, Vec::new());
        for problem in refused {
            looked_at.entry(problem.file.clone()).or_default().parsed.problems.push(problem);
        }
        for (path, Looked { parsed, beside }) in looked_at {
            let state = self.files.entry(path).or_default();
            if parsed.problems.is_empty() || self.piecemeal {
                changed |= state.good != parsed.resources;
                state.good = parsed.resources;
            }
            news.extend(parsed.problems.iter().filter(|problem| !state.problems.contains(problem)).cloned());
            (state.problems, state.unread, state.beside) = (parsed.problems, parsed.unread, beside);
        }
        (changed, news)
    }

    /// Forgets files that are gone for long enough, unless there is a file that nobody could read yet: it may be one of them
    /// under another name, and what that said stays. Gives whether resources went with them.
    fn let_go(&mut self, gone: BTreeMap<PathBuf, FileState>, now: Instant, news: &mut Vec<Problem>) -> bool {
        let unknown = self.files.iter().find(|(_, state)| state.is_unknown()).map(|(path, _)| path.clone());
        let mut changed = false;
        self.waits = false;
        for (path, mut state) in gone {
            let before = state.good.len();
            let there: BTreeSet<String> = self.resources().map(Resource::key).collect();
            state.good.retain(|(_, resource)| !there.contains(&resource.key()));
            let waits = self.emptied.is_none() && now < *state.emptied.get_or_insert(now) + GONE;
            if state.good.is_empty() || unknown.is_none() && !waits {
                changed |= before > 0;
                continue;
            }
            changed |= state.good.len() != before;
            self.waits |= waits;
            state.seen = None;
            if let Some(unknown) = &unknown {
                let reason = format!("gone, and what it said stays while {} has mistakes", unknown.display());
                let hint = Some("mend those; then this one is forgotten".to_string());
                let problem = Problem { file: path.clone(), line: 1, column: 1, reason, hint };
                news.extend((!state.problems.contains(&problem)).then(|| problem.clone()));
                state.problems = vec![problem];
            }
            self.files.insert(path, state);
        }
        changed
    }

    /// A file has just gone, and whether it stays so is worth another look after [`GONE`].
    pub(crate) fn waits(&self) -> bool {
        self.waits
    }

    /// A trust domain that is not the CA's.
    fn of_another_domain(&self, path: &Path, new: &[(u64, Resource)]) -> Vec<Problem> {
        let problem = |(line, resource): &(u64, Resource)| {
            let Resource::Settings(Settings { trust_domain: Some(domain), .. }) = resource else { return None };
            let own = self.trust_domain.as_deref().filter(|own| *own != &**domain)?;
            Some(Problem {
                file: path.into(),
                line: *line,
                column: 1,
                reason: format!("trustDomain {domain} is not the CA's, which is {own}"),
                hint: Some("the CA's cannot be changed: make a new CA for another trust domain".to_string()),
            })
        };
        new.iter().filter_map(problem).collect()
    }
}

/// Reads the files with keys that resources name, from the folder in which the resources' own file is.
fn read_keys_beside(file: &Path, parsed: &mut Parsed) -> Vec<(PathBuf, Option<Stamp>)> {
    let mut beside = Vec::new();
    let Parsed { resources, problems, .. } = parsed;
    for (_, resource) in resources {
        let Resource::Tokens(tokens) = resource else { continue };
        for KeyFile { issuer, path, at } in &tokens.files {
            let path = file.parent().map_or(path.clone(), |folder| folder.join(path));
            // Before it is read: what changes meanwhile is read again.
            beside.push((path.clone(), Stamp::at(&path)));
            let keys = read(&path).map_err(|problem| problem.reason).and_then(|text| read_keys(&text));
            match (keys, tokens.issuers.get_mut(*issuer)) {
                (Ok(keys), Some(issuer)) => issuer.keys = keys,
                (Err(why), _) => {
                    let reason = format!("jwksFile {}: {why}", path.display());
                    problems.push(Problem { file: file.into(), line: at.line, column: at.column, reason, hint: None });
                }
                (Ok(_), None) => {}
            }
        }
    }
    beside
}

fn read(path: &Path) -> Result<String, Problem> {
    let problem = |reason: String| Problem { file: path.into(), line: 1, column: 1, reason, hint: None };
    let unreadable = |error: io::Error| problem(format!("cannot be read: {error}"));
    // Whoever opens a pipe waits for somebody to write into it.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(problem("not a file".to_string()));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(problem(format!("larger than {MAX_FILE} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = good.split(|b| *b == b'\n').count() as u64;
        Problem { line, ..problem("not UTF-8".to_string()) }
    })
}

/// Every YAML or JSON file below `dir`. Hidden ones are left out: editors and ConfigMap mounts keep copies there.
fn collect(dir: &Path, depth: usize, found: &mut BTreeMap<PathBuf, Stamp>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A file may be gone between the listing and here.
        let Ok(meta) = fs::metadata(&path) else { continue };
        if name.starts_with('.') {
            continue;
        }
        if meta.is_dir() && depth > 0 {
            collect(&path, depth - 1, found)?;
        } else if meta.is_file() && is_resource_file(&path) {
            found.insert(path, Stamp::of(&meta));
        }
    }
    Ok(())
}

fn is_resource_file(path: &Path) -> bool {
    matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"))
}

#[cfg(test)]
mod tests;
