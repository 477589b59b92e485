//! The folder of resources as it stands. A bad file is refused, and what it last said well stays.

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

    /// The resources that count.
    pub(crate) fn resources(&self) -> impl Iterator<Item = &Resource> {
        self.good.iter().map(|(_, resource)| resource)
    }

    /// Why the file as it is now does not count; nothing where it does.
    pub(crate) fn problems(&self) -> &[Problem] {
        &self.problems
    }
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
        Self { path, trust_domain, files: BTreeMap::new(), piecemeal, emptied: None }
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
        let (mut changed, mut news) = (false, Vec::new());
        // A duplicate is one only as long as its twin is there: look at refused files again whenever something moved.
        let moved = !gone.is_empty()
            || found.iter().any(|(path, stamp)| self.files.get(path).is_none_or(|f| f.seen.as_ref() != Some(stamp)));
        for (path, stamp) in found {
            let state = self.files.entry(path.clone()).or_default();
            let known =
                state.seen.as_ref() == Some(&stamp) && state.beside.iter().all(|(path, then)| Stamp::at(path) == *then);
            if known && (!moved || state.problems.is_empty()) {
                continue;
            }
            state.seen = Some(stamp);
            let mut parsed = match read(&path) {
                Ok(text) => parse(&path, &text),
                Err(problem) => Parsed { problems: vec![problem], ..Parsed::default() },
            };
            let emptied = parsed.problems.is_empty() && parsed.resources.is_empty() && !state.good.is_empty();
            if emptied && now < *state.emptied.get_or_insert(now) + SETTLES {
                state.seen = None;
                continue;
            }
            state.emptied = None;
            let beside = read_keys_beside(&path, &mut parsed);
            parsed.problems.extend(self.check(&path, &parsed.resources));
            let Some(state) = self.files.get_mut(&path) else { continue };
            if parsed.problems.is_empty() || self.piecemeal {
                changed |= state.good != parsed.resources;
                state.good = parsed.resources;
            }
            news.extend(parsed.problems.iter().filter(|problem| !state.problems.contains(problem)).cloned());
            (state.problems, state.unread, state.beside) = (parsed.problems, parsed.unread, beside);
        }
        changed |= self.let_go(gone, &mut news);
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

    /// Forgets files that are gone, unless there is a file that nobody could read yet: it may be one of them under another
    /// name, and what that said stays. Gives whether resources went with them.
    fn let_go(&mut self, gone: BTreeMap<PathBuf, FileState>, news: &mut Vec<Problem>) -> bool {
        let Some(unknown) = self.files.iter().find(|(_, state)| state.is_unknown()).map(|(path, _)| path.clone())
        else {
            return gone.values().any(|state| !state.good.is_empty());
        };
        let mut changed = false;
        for (path, mut state) in gone {
            let before = state.good.len();
            let there: BTreeSet<String> = self.resources().map(Resource::key).collect();
            state.good.retain(|(_, resource)| !there.contains(&resource.key()));
            changed |= state.good.len() != before;
            if state.good.is_empty() {
                continue;
            }
            let reason = format!("gone, and what it said stays while {} has mistakes", unknown.display());
            let hint = Some("mend those; then this one is forgotten".to_string());
            let problem = Problem { file: path.clone(), line: 1, column: 1, reason, hint };
            news.extend((!state.problems.contains(&problem)).then(|| problem.clone()));
            (state.problems, state.seen) = (vec![problem], None);
            self.files.insert(path, state);
        }
        changed
    }

    /// What one file alone cannot know.
    fn check(&self, path: &Path, new: &[(u64, Resource)]) -> Vec<Problem> {
        let mut problems = Vec::new();
        let problem = |line, reason, hint: &str| Problem {
            file: path.into(),
            line,
            column: 1,
            reason,
            hint: Some(hint.to_string()),
        };
        let others = self.files.iter().filter(|(other, _)| *other != path);
        let mut taken: BTreeMap<String, (PathBuf, u64)> = others
            .flat_map(|(path, state)| state.good.iter().map(move |(line, r)| (r.key(), (path.clone(), *line))))
            .collect();
        for (line, resource) in new {
            if let Resource::Settings(Settings { trust_domain: Some(domain), .. }) = resource
                && let Some(own) = self.trust_domain.as_deref().filter(|own| *own != &**domain)
            {
                let reason = format!("trustDomain {domain} is not the CA's, which is {own}");
                let hint = "the CA's cannot be changed: make a new CA for another trust domain";
                problems.push(problem(*line, reason, hint));
            }
            let (key, place) = (resource.key(), (path.to_path_buf(), *line));
            if let Some((file, first)) = taken.insert(key.clone(), place) {
                let reason = format!("{key} is already in {}:{first}", file.display());
                problems.push(problem(*line, reason, "take one of the two out"));
            }
        }
        problems
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
mod tests {
    use super::*;

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  ports:\n  - {port: 80, targetPort: 8000}\n";

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().into(), "cluster.local");
        (dir, folder)
    }

    fn refused(text: &str) -> String {
        let (dir, mut folder) = folder();
        fs::write(dir.path().join("a.yaml"), text).unwrap();
        let (_, refusals) = folder.reload(Instant::now()).unwrap();
        assert!(!refusals.is_empty(), "must be refused: {text}");
        let text = refusals[0].to_string();
        text.split("a.yaml").nth(1).unwrap().to_string()
    }

    #[test]
    fn a_bad_file_is_refused_with_its_place_while_its_last_good_state_stays() {
        let (dir, mut folder) = folder();
        let file = dir.path().join("web.yaml");
        fs::write(&file, SERVICE).unwrap();
        assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()));
        fs::write(
            &file,
            format!(
                "{SERVICE}---\napiVersion: v1\nkind: Service\nmetadata: {{name: two}}\nspec: {{ports: [{{port: 0}}]}}\n"
            ),
        )
        .unwrap();
        let (changed, refusals) = folder.reload(Instant::now()).unwrap();
        assert!(!changed);
        assert_eq!((refusals[0].line, refusals[0].column), (11, 23), "{}", refusals[0]);
        assert!(refusals[0].to_string().contains("port 0 cannot be reached"));
        assert_eq!(folder.resources().count(), 1, "the last good state stays");
        assert_eq!(folder.reload(Instant::now()).unwrap(), (false, Vec::new()), "told once");
    }

    #[test]
    fn what_is_empty_is_believed_at_the_second_look() {
        let (dir, mut folder) = folder();
        let (file, other) = (dir.path().join("web.yaml"), dir.path().join("other.yaml"));
        fs::write(&file, SERVICE).unwrap();
        fs::write(&other, SERVICE.replace("web", "other")).unwrap();
        let now = Instant::now();
        assert!(folder.reload(now).unwrap().0);
        fs::write(&file, "").unwrap();
        assert_eq!(folder.reload(now).unwrap(), (false, Vec::new()), "it may be about to be written");
        fs::write(&file, SERVICE).unwrap();
        assert_eq!(folder.reload(now + SETTLES).unwrap(), (false, Vec::new()));
        fs::write(&file, "").unwrap();
        assert!(!folder.reload(now).unwrap().0);
        assert!(folder.reload(now + SETTLES).unwrap().0);
        assert_eq!(folder.resources().count(), 1);
        // One file that goes is gone; that all go may be a mount.
        fs::remove_file(&file).unwrap();
        fs::remove_file(&other).unwrap();
        assert_eq!(folder.reload(now).unwrap(), (false, Vec::new()));
        assert_eq!(folder.resources().count(), 1);
        assert!(folder.reload(now + SETTLES).unwrap().0);
        assert_eq!(folder.resources().count(), 0);
    }

    #[test]
    fn a_file_that_gets_another_name_and_a_mistake_says_what_it_said() {
        let (dir, mut folder) = folder();
        let (a, b) = (dir.path().join("a.yaml"), dir.path().join("b.yaml"));
        fs::write(&a, SERVICE).unwrap();
        folder.reload(Instant::now()).unwrap();
        fs::remove_file(&a).unwrap();
        fs::write(&b, SERVICE.replace("port: 80,", "port: 0,")).unwrap();
        let (changed, problems) = folder.reload(Instant::now()).unwrap();
        assert!(!changed);
        assert_eq!((problems.len(), folder.resources().count()), (2, 1), "{problems:?}");
        assert!(problems[1].to_string().contains("a.yaml:1:1: gone, and what it said stays while"), "{}", problems[1]);
        assert_eq!(folder.reload(Instant::now()).unwrap(), (false, Vec::new()), "told once");
        fs::write(&b, SERVICE.replace("8000", "8001")).unwrap();
        assert_eq!(folder.reload(Instant::now()).unwrap(), (true, Vec::new()));
        assert_eq!((folder.files().len(), folder.resources().count()), (1, 1));
    }

    #[test]
    fn files_beyond_those_that_are_read_are_told() {
        let (dir, mut folder) = folder();
        for number in 0..MAX_FILES + 2 {
            fs::write(dir.path().join(format!("{number:05}.yaml")), "").unwrap();
        }
        let (_, problems) = folder.reload(Instant::now()).unwrap();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].to_string().contains("02000.yaml:1:1: not read, as 1 others are not"), "{}", problems[0]);
        assert_eq!(folder.reload(Instant::now()).unwrap(), (false, Vec::new()), "told once");
    }

    #[test]
    fn what_is_no_file_holds_nobody_up() {
        assert_eq!(read(Path::new("/dev/zero")).unwrap_err().reason, "not a file");
        assert!(read(Path::new("/nowhere")).unwrap_err().reason.contains("cannot be read"));
    }

    #[test]
    fn a_typo_is_refused_with_what_was_probably_meant() {
        let settings = "apiVersion: sheetbend.io/v1alpha1\nkind: MeshSettings\nmetadata: {name: mesh}\nspec:\n";
        let text = refused(&format!("{settings}  meshRange: [10.0.0.0/8]\n"));
        assert!(text.starts_with(":5:3: unknown field `meshRange`; did you mean `meshRanges`?"), "{text}");
        let text = refused(&format!("{settings}  meshRanges: [10.0.0.0/8, 10.0.0.0/99]\n"));
        assert!(text.starts_with(":5:28: `10.0.0.0/99` is not a range"), "{text}");
        let text = refused(&format!("{settings}  trustDomain: other.example\n"));
        assert!(text.contains("is not the CA's, which is cluster.local"), "{text}");
        let text = refused("apiVersion: v1\nkind: Sevice\nmetadata: {name: web}\n");
        assert!(text.starts_with(":2:7: `Sevice` is not a kind that is read here; did you mean `Service`?"), "{text}");
        let text = refused("apiVersion: v1\nkind: [\n");
        assert!(text.starts_with(':'), "{text}");
    }

    #[test]
    fn what_the_parser_cannot_take_is_told_in_plain_words() {
        let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n  - backendRefs: ";
        for (backends, wanted) in [
            ("[{name: web, port: 80, weight: -1}]", ":7:49: not a whole number of 0 or more; write digits alone"),
            ("[{name: web, port: 99999}]", ":7:37: not a number from 0 to 65535; write a whole number"),
            ("{name: web}", "not a list; write `[one, two]`"),
            ("[web]", "not an object; write `{key: value}`"),
            ("[{name: web, name: two, port: 80}]", "the key `name` is there twice; take one of the two out"),
            ("[{port: 80}]", "missing field `name`; it cannot be left out"),
        ] {
            let text = refused(&format!("{route}{backends}\n"));
            assert!(text.contains(wanted), "{backends}: {text}");
        }
    }

    #[test]
    fn a_field_that_is_not_obeyed_is_refused_rather_than_ignored() {
        let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n";
        let text = refused(&format!("{route}  - sessionPersistence: {{}}\n"));
        assert!(text.starts_with(":7:5: unknown field `sessionPersistence`; the Gateway API has this field"), "{text}");
    }

    #[test]
    fn a_condition_that_cannot_be_asked_is_refused_at_its_place_with_a_hint() {
        let http = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n  - backendRefs: [{name: web, port: 80}]\n    matches:\n    - ";
        let grpc = http.replace("HTTPRoute", "GRPCRoute");
        let cases = [
            (
                http,
                "path: {type: RegularExpression, value: '/(a'}",
                ":9:46: bad regular expression `/(a`: unclosed group; patterns are RE2's",
            ),
            (http, "path: {type: RegularExpression, value: '((a{100}){100}){100}'}", "too large when compiled"),
            (
                http,
                "path: {type: Regex, value: /a}",
                ":9:20: `Regex` is no type of path; write Exact, PathPrefix or RegularExpression",
            ),
            (http, "path: {value: a}", "the path `a` does not begin with /"),
            (http, "path: {value: /a?b=c}", "`/a?b=c` is more than a path; match the query with queryParams"),
            (http, "path: {value: /a/../b}", "not in its normal form"),
            (http, "method: get", "`get` is not a method; write it in upper case"),
            (http, "headers: [{name: x a, value: b}]", "`x a` is not a header's name"),
            (http, "headers: [{name: A, value: b}, {name: a, value: c}]", ":9:45: two conditions on `a`"),
            (http, "headers: [{name: a, type: Prefix, value: b}]", "`Prefix` is no type of match"),
            (http, "queryParams: [{name: a, type: RegularExpression, value: '*'}]", "bad regular expression `*`"),
            (http, "queryParams: [{name: a=b, value: c}]", "`a=b` is not a query parameter's name"),
            (&grpc, "method: {type: Exact}", "neither a service nor a method"),
            (&grpc, "method: {service: a/b}", "`a/b` is not a gRPC service or method"),
            (&grpc, "method: {type: RegularExpression, service: 'a)|(b'}", "bad regular expression `a)|(b`"),
        ];
        for (route, condition, wanted) in cases {
            let text = refused(&format!("{route}{condition}\n"));
            assert!(text.contains(wanted), "{condition}: {text}");
        }
    }

    #[test]
    fn what_the_specification_forbids_of_filters_and_backends_is_refused_at_its_place_with_a_hint() {
        let http = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n  - ";
        let to = "backendRefs: [{name: web, port: 80}]\n    ";
        let redirect = "{type: RequestRedirect, requestRedirect: {hostname: a.example}}";
        let rewrite = "{type: URLRewrite, urlRewrite: {hostname: a.example}}";
        let set = |name: &str| {
            format!("{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: {name}, value: b}}]}}}}")
        };
        let prefix = "{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /a}}}";
        let cases = [
            (format!("{to}filters: [{redirect}]"), ":7:26: a redirected request is not forwarded; take the"),
            (format!("filters: [{redirect}, {rewrite}]"), "RequestRedirect and URLRewrite cannot both be obeyed"),
            (format!("{to}filters: [{rewrite}, {rewrite}]"), "two filters of type URLRewrite; write what both say"),
            (format!("{to}filters: [{{type: RequestMirror}}]"), "a filter of type `RequestMirror` is not obeyed here"),
            (format!("{to}filters: [{{type: URLRewrite}}]"), "has not its own field"),
            (format!("{to}filters: [{}]", set("Host")), ":8:82: `host` is not edited as a header: write a filter"),
            (format!("{to}filters: [{}]", set("Connection")), "is of the connection, not of the message"),
            (format!("{to}filters: [{}]", set("sheetbend-unsent")), "is of the connection, not of the message"),
            (format!("{to}filters: [{}]", set("'a b'")), "`a b` is not a header's name"),
            (format!("{to}filters: [{prefix}]"), "and no single prefix that the rule matches; write one match"),
            (
                format!("{to}filters: [{prefix}]\n    matches: [{{path: {{type: Exact, value: /b}}}}]"),
                "no single prefix",
            ),
            (
                "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 304}}]".into(),
                "304 sends nobody elsewhere",
            ),
            ("filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp}}]".into(), "write http or https"),
            (
                "backendRefs: [{name: web, port: 80, weight: 0}]".into(),
                ":7:26: the weights of this rule's backends sum to zero",
            ),
            ("backendRefs: []".into(), "a rule without a backend answers nothing"),
            (
                format!("backendRefs: [{{name: web, port: 80, filters: [{redirect}]}}]"),
                "`RequestRedirect` is not obeyed here",
            ),
        ];
        for (rule, wanted) in cases {
            let text = refused(&format!("{http}{rule}\n"));
            assert!(text.contains(wanted), "{rule}: {text}");
        }
    }

    #[test]
    fn a_fault_that_cannot_happen_is_refused_at_its_place_with_a_hint() {
        let fault = "apiVersion: sheetbend.io/v1alpha1\nkind: FaultInjection\nmetadata: {name: chaos}\nspec:\n  ";
        let to = "targetRefs: [{kind: Service, name: web}]\n  ";
        let cases = [
            (String::new() + to, "neither a delay nor an abort"),
            ("targetRefs: []\n  abort: {percentage: {value: 1}, httpStatus: 503}".into(), ":5:15: no targetRef"),
            (
                format!("{to}abort: {{httpStatus: 503}}"),
                ":6:10: no percentage: of how many requests?; write percentage:",
            ),
            (format!("{to}abort: {{percentage: {{value: 101}}, httpStatus: 503}}"), "101 is not between 0 and 100"),
            (format!("{to}abort: {{percentage: {{value: 1}}}}"), "no status: write httpStatus or grpcStatus"),
            (format!("{to}abort: {{percentage: {{value: 1}}, httpStatus: 99}}"), "99 is not a status"),
            (format!("{to}abort: {{percentage: {{value: 1}}, grpcStatus: BUSY}}"), "`BUSY` is no gRPC status"),
            (format!("{to}delay: {{percentage: {{value: 1}}, fixedDelay: 0s}}"), "write one between 1ms and 1h"),
            (format!("{to}delay: {{percentage: {{value: 1}}, fixedDelay: -1s}}"), "is not a duration"),
            (
                format!("{to}delays: {{}}\n  abort: {{percentage: {{value: 1}}, httpStatus: 503}}"),
                "unknown field `delays`; did you mean `delay`?",
            ),
        ];
        for (spec, wanted) in cases {
            let text = refused(&format!("{fault}{spec}\n"));
            assert!(text.contains(wanted), "{spec}: {text}");
        }
    }

    #[test]
    fn a_policy_that_cannot_be_obeyed_is_refused_at_its_place() {
        let policy = "apiVersion: sheetbend.io/v1alpha1\nkind: BackendPolicy\nmetadata: {name: web}\nspec:\n  targetRefs: [{kind: Service, name: web}]\n";
        let text = refused(&format!("{policy}  outlierDetection: {{baseEjectionTime: 1.5s}}\n"));
        assert!(text.starts_with(":6:40: `1.5s` is not a duration"), "{text}");
        let text = refused(&format!("{policy}  outlierDetection: {{baseEjectionTime: 2s, maxEjectionTime: 1s}}\n"));
        assert!(text.starts_with(":6:21: outlierDetection.maxEjectionTime: it is shorter"), "{text}");
        let text = refused(&format!("{policy}  outlierDetection: {{consecutive5xxError: 2}}\n"));
        assert!(text.contains("unknown field `consecutive5xxError`; did you mean `consecutive5xxErrors`?"), "{text}");
        let route = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web}\nspec:\n  parentRefs: [{kind: Service, name: web}]\n  rules:\n";
        let text = refused(&format!(
            "{route}  - backendRefs: [{{name: web, port: 80}}]\n    timeouts: {{request: 1s, backendRequest: 2s}}\n"
        ));
        assert!(text.starts_with(":8:45: timeouts.backendRequest: it is longer"), "{text}");
    }

    #[test]
    fn the_same_resource_in_two_files_is_refused_until_one_is_gone() {
        let (dir, mut folder) = folder();
        fs::write(dir.path().join("a.yaml"), SERVICE).unwrap();
        fs::write(dir.path().join("b.yaml"), SERVICE).unwrap();
        let (_, refusals) = folder.reload(Instant::now()).unwrap();
        assert!(refusals[0].to_string().contains("Service default/web is already in"), "{}", refusals[0]);
        fs::remove_file(dir.path().join("a.yaml")).unwrap();
        folder.reload(Instant::now()).unwrap();
        assert_eq!(folder.files().values().filter(|f| !f.problems().is_empty()).count(), 0);
        assert_eq!(folder.resources().count(), 1);
    }
}
