//! A judge behind a chat endpoint.

use super::{Answer, Judge, Question, chat};
use crate::error::Result;

/// See [`chat::Endpoint`].
#[derive(Debug)]
pub struct Http(pub chat::Endpoint);

impl Judge for Http {
    fn name(&self) -> String {
        format!("http:{}", self.0.model)
    }

    fn identity(&self) -> Result<String> {
        Ok(self.0.url.clone())
    }

    fn ask(
        &self,
        questions: &mut dyn Iterator<Item = Question>,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        let mut questions = questions
            .map(|question| chat::Question { system: Some(question.system), user: question.user });
        self.0.ask_all(&mut questions, &mut |index, answer| {
            done(index, answer.map_err(|failure| failure.to_string()))
        })?;
        Ok(())
    }
}
