//! `vault key`: what opens the vault.

use crate::{
    CliError, Console, Exit,
    args::{Global, KeyVerb, NewKey},
    confirm::{self, Question},
    context,
    output::{json, plain, rfc3339, table},
    secret,
};
use highwater_vault::{
    KeyRing, KeySource, VaultError,
    keys::{Wrapping, WrappingId},
};
use serde_json::{Value, json as document};

pub(crate) async fn run(
    global: &Global,
    verb: &KeyVerb,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let mut ring = context::keys(global, console).await?;
    match verb {
        KeyVerb::List => list(global, &ring, console)?,
        KeyVerb::Add { new, label } => {
            let source = source(new, console)?;
            let id = ring.add(&source, label).await?;
            told(global, &ring, &[("added", id)], console)?;
            kept(global, &source, console)?;
        }
        KeyVerb::Remove { id, yes } => {
            let plan = format!("Remove {}. What is left:", describe(find(&ring, *id)?));
            if ring.wrappings().len() == 1 {
                return Err(VaultError::LastWrapping.into());
            }
            let left = ring.wrappings().iter().filter(|wrapping| wrapping.id != *id);
            let lines: Vec<String> = left.map(|wrapping| format!("  {}", describe(wrapping))).collect();
            confirm(global, &ring, *id, *yes, &format!("{plan}\n{}", lines.join("\n")), console)?;
            ring.remove(*id).await?;
            told(global, &ring, &[("removed", *id)], console)?;
        }
        KeyVerb::Rotate { id, new, yes } => {
            let plan = format!("Replace {} by a new key.", describe(find(&ring, *id)?));
            confirm(global, &ring, *id, *yes, &plan, console)?;
            let source = source(new, console)?;
            let added = ring.rotate(*id, &source).await?;
            told(global, &ring, &[("removed", *id), ("added", added)], console)?;
            kept(global, &source, console)?;
        }
    }
    Ok(Exit::Success)
}

fn source(new: &NewKey, console: &mut Console<'_>) -> Result<KeySource, CliError> {
    Ok(match (&new.new_key_file, &new.new_passphrase_file, &new.new_key_command) {
        (Some(path), ..) => KeySource::File(path.clone()),
        (_, Some(path), _) => KeySource::PassphraseFile(path.clone()),
        (.., Some(command)) => KeySource::Command(command.clone()),
        // The command line wants one of the four.
        _ => KeySource::Passphrase(secret::ask_new(console)?),
    })
}

fn find(ring: &KeyRing, id: WrappingId) -> Result<&Wrapping, CliError> {
    let found = ring.wrappings().iter().find(|wrapping| wrapping.id == id);
    found.ok_or_else(|| VaultError::UnknownWrapping(id).into())
}

fn describe(wrapping: &Wrapping) -> String {
    let label =
        if wrapping.label.is_empty() { String::new() } else { format!(" {:?}", plain(&wrapping.label)) };
    format!("{} {}{label}", wrapping.id, wrapping.kind().text())
}

/// Shows what will be, and has the key's id typed.
fn confirm(
    global: &Global,
    ring: &KeyRing,
    id: WrappingId,
    yes: bool,
    plan: &str,
    console: &mut Console<'_>,
) -> Result<(), CliError> {
    if !global.json {
        writeln!(console.err, "{plan}")?;
        if ring.opened_by() == Some(id) {
            writeln!(console.err, "It is the one that the vault was opened with now.")?;
        }
        writeln!(
            console.err,
            "A collector needs another one in its configuration before its next start, if it has this one."
        )?;
    }
    if yes {
        return Ok(());
    }
    let question = Question {
        word: &id.to_string(),
        prompt: format!("Type {id} to go on"),
        unasked: format!("key {id} would be removed"),
        refused: format!("key {id} was not confirmed, and stays"),
    };
    confirm::confirm(console, global.json, question)
}

fn list(global: &Global, ring: &KeyRing, console: &mut Console<'_>) -> Result<(), CliError> {
    if global.json {
        return json(console, &listed(ring));
    }
    let row = |wrapping: &Wrapping| {
        let used = if ring.opened_by() == Some(wrapping.id) { "now" } else { "" };
        let created = match wrapping.created_at_ms {
            0 => "-".to_owned(),
            ms => rfc3339(ms),
        };
        let kind = wrapping.kind().text().to_owned();
        vec![wrapping.id.to_string(), kind, created, used.to_owned(), plain(&wrapping.label)]
    };
    let rows: Vec<Vec<String>> = ring.wrappings().iter().map(row).collect();
    table(console, &["ID", "OPENED BY", "CREATED", "USED", "LABEL"], &rows)?;
    older(ring, console)
}

fn listed(ring: &KeyRing) -> Value {
    let key = |wrapping: &Wrapping| {
        let created = (wrapping.created_at_ms > 0).then(|| rfc3339(wrapping.created_at_ms));
        document!({
            "id": wrapping.id.to_string(),
            "kind": wrapping.kind(),
            "label": wrapping.label,
            "created-at": created,
            "created-at-ms": wrapping.created_at_ms,
            "used": ring.opened_by() == Some(wrapping.id),
        })
    };
    document!({
        "vault": ring.id(),
        "document": ring.number(),
        "older-documents": ring.older_documents(),
        "keys": ring.wrappings().iter().map(key).collect::<Vec<_>>(),
    })
}

fn told(
    global: &Global,
    ring: &KeyRing,
    done: &[(&str, WrappingId)],
    console: &mut Console<'_>,
) -> Result<(), CliError> {
    if global.json {
        let mut whole = listed(ring);
        for (what, id) in done {
            whole[*what] = id.to_string().into();
        }
        return json(console, &whole);
    }
    for (what, id) in done {
        writeln!(console.out, "{what} key {id}")?;
    }
    older(ring, console)
}

fn older(ring: &KeyRing, console: &mut Console<'_>) -> Result<(), CliError> {
    if ring.older_documents() > 0 {
        writeln!(
            console.err,
            "{} older keys document(s) could not be deleted; the next change of keys tries again. With them, removed keys still open the vault.",
            ring.older_documents()
        )?;
    }
    Ok(())
}

fn kept(global: &Global, source: &KeySource, console: &mut Console<'_>) -> Result<(), CliError> {
    if let (KeySource::File(path), false) = (source, global.json) {
        writeln!(console.out, "its key file is {}: keep a copy elsewhere than the vault", path.display())?;
    }
    Ok(())
}
