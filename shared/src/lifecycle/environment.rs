//! The environment as the system shows it to others.
//!
//! Whoever may look at a process sees what its environment was when it started, whatever it has unset since. What is
//! secret there is therefore overwritten where it stands, which is in this process' memory.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
};

/// Bytes of an environment that are looked at. The system takes no larger one from anybody.
const MOST: u64 = 8 * 1024 * 1024;

/// Overwrites the values of the variables that `secret` names. To be called while no other thread can be reading the
/// environment, and when all that is wanted of it was read: these variables are empty from then on.
///
/// A process that others of its user may not look at (`PR_SET_DUMPABLE`) may not do this to itself either, unless it
/// is root's, and does not need it then: nothing is said of what cannot be done.
pub(super) fn blank(secret: impl Fn(&str) -> bool) {
    if let Err(error) = try_blank(secret)
        && error.kind() != io::ErrorKind::PermissionDenied
    {
        super::complain(&format!("secrets stay in what the system shows of the environment: {error}"));
    }
}

fn try_blank(secret: impl Fn(&str) -> bool) -> io::Result<()> {
    let Some((start, end)) = place()? else { return Ok(()) };
    let mut memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    memory.seek(SeekFrom::Start(start))?;
    let mut environment = Vec::new();
    (&mut memory).take((end - start).min(MOST)).read_to_end(&mut environment)?;
    let mut at = start;
    for entry in environment.split(|byte| *byte == 0) {
        let name = entry.split(|byte| *byte == b'=').next().unwrap_or_default();
        if name.len() < entry.len() && std::str::from_utf8(name).is_ok_and(&secret) {
            memory.seek(SeekFrom::Start(at + name.len() as u64 + 1))?;
            memory.write_all(&vec![0; entry.len() - name.len() - 1])?;
        }
        at += entry.len() as u64 + 1;
    }
    environment.fill(0);
    Ok(())
}

/// Where the environment stands in memory: fields 50 and 51 of what the system tells of a process (`env_start`,
/// `env_end`).
fn place() -> io::Result<Option<(u64, u64)>> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    // The program's name, which may have anything in it, is in parentheses; what follows begins with field 3.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace().skip(50 - 3);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Ok(field().zip(field()).filter(|(start, end)| *start > 0 && start < end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_where_it_is_looked_for() {
        let (start, end) = place().unwrap().unwrap();
        assert_eq!(end - start, fs::read("/proc/self/environ").unwrap().len() as u64);
    }
}
