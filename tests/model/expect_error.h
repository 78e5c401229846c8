// A statement that must throw generate::Error with a text that says what was wrong.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "engine/error.h"

namespace model_test {

template <class Function>
void expect_error(const Function& function, const std::string& part) {
  try {
    function();
    ADD_FAILURE() << "nothing was thrown; expected an error with '" << part << "'";
  } catch (const generate::Error& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
        << "the text is '" << e.what() << "' and lacks '" << part << "'";
  }
}

}  // namespace model_test
