//! `group`: machines whose points are taken at one instant.

mod define;
mod document;
mod show;

pub(crate) use document::{consistency_text, host_names, marker_of_points, point_document};

use crate::{
    CliError, Console, Exit,
    args::{Global, GroupVerb},
    context,
};

pub(crate) async fn run(
    global: &Global,
    verb: &GroupVerb,
    console: &mut Console<'_>,
) -> Result<Exit, CliError> {
    let vault = context::open(global, console).await?;
    match verb {
        GroupVerb::List => show::list(global, &vault, console).await,
        GroupVerb::Show { group } => show::show(global, &vault, group, console).await,
        GroupVerb::Points { group } => show::points(global, &vault, group, console).await,
        change => define::run(global, &vault, change, console).await,
    }
}
