//! Which file a command's name means, found before anything is started.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// A program that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    /// What the operator called it: its `argv[0]`.
    pub(super) name: OsString,
    /// The file.
    pub(super) file: PathBuf,
}

/// Why a command cannot be started. The exit statuses are those of env(1) and of every shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unfit {
    /// No such file: 127.
    NotFound(OsString),
    /// A file that this user may not execute, or a directory: 126.
    NotExecutable(PathBuf),
}

impl Unfit {
    pub(super) fn exit_status(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable(_) => 126,
        }
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(name) if name.as_bytes().contains(&b'/') => {
                write!(f, "{}: no such file", name.display())
            }
            Self::NotFound(name) => write!(f, "{}: command not found: no folder of PATH has it", name.display()),
            Self::NotExecutable(file) => write!(f, "{}: cannot be executed: check its permissions", file.display()),
        }
    }
}

/// As execvp(3) looks a name up: one with a slash is a path, any other is searched for in `path`.
pub(super) fn find(name: &OsStr, path: Option<&OsStr>) -> Result<Program, Unfit> {
    let program = |file: PathBuf| Program { name: name.to_os_string(), file };
    if name.as_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return match (runnable(&file), file.exists()) {
            (true, _) => Ok(program(file)),
            (false, true) => Err(Unfit::NotExecutable(file)),
            (false, false) => Err(Unfit::NotFound(name.to_os_string())),
        };
    }
    let mut forbidden = None;
    for folder in std::env::split_paths(path.unwrap_or(OsStr::new("/usr/bin:/bin"))) {
        let file = folder.join(name);
        if runnable(&file) {
            return Ok(program(file));
        }
        if forbidden.is_none() && file.is_file() {
            forbidden = Some(file);
        }
    }
    Err(forbidden.map_or_else(|| Unfit::NotFound(name.to_os_string()), Unfit::NotExecutable))
}

fn runnable(file: &Path) -> bool {
    file.is_file() && access(file, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_bare_name_is_the_first_executable_of_path() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        for (folder, mode) in [(&first, 0o644), (&second, 0o755)] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("app"), "#!/bin/sh\n").unwrap();
            fs::set_permissions(folder.join("app"), fs::Permissions::from_mode(mode)).unwrap();
        }
        let path = std::env::join_paths([&first, &second]).unwrap();
        assert_eq!(find(OsStr::new("app"), Some(&path)).unwrap().file, second.join("app"));
        let refused = find(OsStr::new("app"), Some(first.as_os_str())).unwrap_err();
        assert_eq!(refused, Unfit::NotExecutable(first.join("app")));
        assert_eq!(refused.exit_status(), 126);
        let missing = find(OsStr::new("no-such-app"), Some(&path)).unwrap_err();
        assert_eq!((missing.exit_status(), missing.to_string().contains("command not found")), (127, true));
    }

    #[test]
    fn a_name_with_a_slash_is_a_path_and_a_folder_is_not_a_program() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(dir.path().as_os_str(), None).unwrap_err().exit_status(), 126);
        assert_eq!(find(OsStr::new("./nothing/here"), None).unwrap_err().exit_status(), 127);
    }
}
