//! What of this machine a program stands on: its settings, folders, files and limits.

use std::{
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit},
        statvfs::statvfs,
    },
    unistd::geteuid,
};

use super::{Area, Finding};
use crate::{
    check,
    config::{self, Auth, Settings, StoreSettings},
};

/// Bytes below which a disk is as good as full: an installation of one package takes more.
const ROOM_NEEDED: u64 = 256 * 1024 * 1024;
/// Bytes below which somebody should make room.
const ROOM_WANTED: u64 = 2 * 1024 * 1024 * 1024;
/// Files below which somebody should; npm packages are tens of thousands.
const FILES_WANTED: u64 = 100_000;
/// Open files below which a node does not get far, whatever its settings.
const OPEN_FILES: u64 = 4_096;
/// Open files beside those of clients: pipes of servers, the store, the bus.
const OWN_FILES: u64 = 512;

/// What was odd about settings that are valid.
pub(super) fn settings(settings: &Settings) -> Vec<Finding> {
    let remedy = "correct the name, or remove it";
    let mut findings: Vec<Finding> = settings
        .warnings
        .iter()
        .map(|warning| {
            let (name, text) = warning.split_once(": ").unwrap_or(("settings", warning));
            let remedy = if text.contains("did you mean") {
                remedy
            } else {
                "change the setting; --help explains each"
            };
            Finding::warning(Area::Settings, name, text, remedy)
        })
        .collect();
    findings.extend(settings.later.keys().map(|name| {
        Finding::warning(Area::Settings, *name, "is set, and this version does not use it", "remove it")
    }));
    if settings.auth == Auth::None && !settings.host.is_loopback() {
        findings.push(Finding::warning(
            Area::Settings,
            "AUTH",
            format!("nobody is asked for a credential, and {} can be reached from elsewhere", settings.host),
            "set AUTH=keys or AUTH=jwt, unless something in front authenticates",
        ));
    }
    let set = settings.effective().iter().filter(|(_, _, origin)| *origin != config::Origin::Default).count();
    if findings.is_empty() {
        findings.push(Finding::ok(Area::Settings, "settings", format!("{set} set, all of them understood")));
    }
    findings
}

/// Whether a file with settings shows its secrets to others.
pub(super) fn env_file(path: &Path) -> Option<Finding> {
    let text = std::fs::read_to_string(path).ok()?;
    let secret = |line: &str| {
        let (name, value) = line.trim().strip_prefix("export ").unwrap_or(line.trim()).split_once('=')?;
        let secret = config::find(name.trim()).is_some_and(|variable| variable.secret);
        (secret && !value.trim().is_empty()).then_some(())
    };
    text.lines().find_map(secret)?;
    private(path, "the file with settings")
}

/// Folders, files, room and limits.
pub fn machine(settings: &Settings, gateway: bool) -> Vec<Finding> {
    let mut findings = data_folder(settings);
    findings.extend(key_files(settings));
    findings.extend(room(settings));
    findings.push(open_files(settings, gateway));
    findings
}

fn data_folder(settings: &Settings) -> Vec<Finding> {
    let folder = &settings.data_dir;
    let text = match check::data_folder(folder) {
        Ok(text) => text,
        Err(text) => {
            let user = geteuid();
            return vec![Finding::error(
                Area::Permissions,
                "DATA_DIR",
                text,
                format!(
                    "give it to the user {user} that this program runs as, or set DATA_DIR to another folder"
                ),
            )];
        }
    };
    let mut findings = vec![Finding::ok(Area::Permissions, "DATA_DIR", text)];
    let Ok(about) = folder.metadata() else { return findings };
    if about.uid() != geteuid().as_raw() {
        let text = format!("{} belongs to the user {}, not to this one", folder.display(), about.uid());
        let remedy = format!("chown it to the user {}, or run as its owner", geteuid());
        findings.push(Finding::warning(Area::Permissions, "DATA_DIR", text, remedy));
    }
    let mode = about.permissions().mode() & 0o777;
    if mode & 0o077 != 0 && matches!(settings.store, StoreSettings::Embedded) {
        let text = format!("other users may look into {} (mode {mode:03o})", folder.display());
        findings.push(Finding::warning(
            Area::Permissions,
            "DATA_DIR",
            text,
            format!("chmod 700 {}", folder.display()),
        ));
    }
    findings
}

/// The files that only this user should be able to read.
fn key_files(settings: &Settings) -> Vec<Finding> {
    let mut files: Vec<(&str, PathBuf)> = Vec::new();
    match &settings.secrets_keys_file {
        Some(file) => files.push(("SECRETS_KEYS_FILE", file.clone())),
        None => files.push(("the generated key", settings.data_dir.join(crate::node::KEY_FILE))),
    }
    files.extend(settings.http.tls.iter().map(|tls| ("TLS_KEY_FILE", tls.key.clone())));
    if let Some(bus) = &settings.bus {
        files.extend(bus.tls.identity.iter().map(|(_, key)| ("NATS_TLS_KEY_FILE", key.clone())));
    }
    let logins = ["NATS_CREDS", "NATS_NKEY_SEED_FILE"];
    files.extend(logins.iter().filter_map(|name| Some((*name, settings.shown(name)?.into()))));
    let there: Vec<_> = files.into_iter().filter(|(_, path)| path.exists()).collect();
    let mut findings: Vec<Finding> = there.iter().filter_map(|(what, path)| private(path, what)).collect();
    if findings.is_empty() && !there.is_empty() {
        let text = format!("{} can be read by this user alone", there.len());
        findings.push(Finding::ok(Area::Permissions, "files with keys", text));
    }
    findings
}

/// Says so if others may read a file.
fn private(path: &Path, what: &str) -> Option<Finding> {
    let mode = path.metadata().ok()?.permissions().mode() & 0o777;
    let who = match mode {
        mode if mode & 0o004 != 0 => "every user of this machine",
        mode if mode & 0o040 != 0 => "the file's group",
        _ => return None,
    };
    Some(Finding::warning(
        Area::Permissions,
        what,
        format!("{who} can read {} (mode {mode:03o})", path.display()),
        format!("chmod 600 {}", path.display()),
    ))
}

fn room(settings: &Settings) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut devices = Vec::new();
    for (what, folder) in [("data", &settings.data_dir), ("packages", &settings.packages.folder)] {
        let Some(folder) = folder.ancestors().map(here).find(|folder| folder.exists()) else { continue };
        let Ok(device) = folder.metadata().map(|about| about.dev()) else { continue };
        if devices.contains(&device) {
            continue;
        }
        devices.push(device);
        findings.extend(room_below(what, folder));
    }
    findings
}

fn here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

fn room_below(what: &str, folder: &Path) -> Vec<Finding> {
    let Ok(disk) = statvfs(folder) else { return Vec::new() };
    let free = disk.blocks_available() * disk.fragment_size();
    let (shown, gib) = (folder.display(), free as f64 / (1024.0 * 1024.0 * 1024.0));
    let text = format!("{gib:.1} GiB free below {shown}");
    let remedy = "make room on that disk, or set DATA_DIR to a folder on another one";
    let mut findings = vec![match free {
        free if free < ROOM_NEEDED => Finding::error(Area::Disk, what, text, remedy),
        free if free < ROOM_WANTED => Finding::warning(Area::Disk, what, text, remedy),
        _ => Finding::ok(Area::Disk, what, text),
    }];
    // Some file systems have no such number.
    if disk.files() > 0 && disk.files_available() < FILES_WANTED {
        let text = format!("{} more files can be made below {shown}", disk.files_available());
        findings.push(Finding::warning(Area::Disk, format!("{what}, inodes"), text, remedy));
    }
    findings
}

fn open_files(settings: &Settings, gateway: bool) -> Finding {
    let what = "open files";
    let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return Finding::ok(Area::Limits, what, "the system does not say");
    };
    let clients = u64::try_from(settings.limits.connections).unwrap_or(u64::MAX);
    let wanted = if gateway { clients.saturating_add(OWN_FILES) } else { OPEN_FILES };
    let text = format!("a process may have {hard}");
    let raise = |number| format!("raise it to {number} (ulimit -Hn, LimitNOFILE= of systemd)");
    if hard < OPEN_FILES {
        Finding::warning(Area::Limits, what, text, raise(wanted.max(OPEN_FILES)))
    } else if hard < wanted {
        let text = format!("{text}, and MAX_CONNECTIONS is {clients}");
        Finding::warning(Area::Limits, what, text, format!("{}, or lower MAX_CONNECTIONS", raise(wanted)))
    } else {
        Finding::ok(Area::Limits, what, text)
    }
}
